"""What the GPU tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gpu import cases


@pytest.fixture
def poison() -> Iterator[None]:
    """Memory that nobody wrote is NaN while the test runs."""
    with cases.poisoned():
        yield
