"""The model card of a quantized folder: what was done, what was measured, who can load it."""

from __future__ import annotations

from typing import Any

import jinja2


def model_card(record: dict[str, Any], run: dict[str, Any]) -> str:
    """Markdown with the front matter that model hubs read, from bitwright.json and bitwright-run.json."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bitwright.report", "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    layers = record["layers"]
    worst = sorted(layers.items(), key=lambda item: -item[1]["relative_error"])[:5]
    return environment.get_template("card.md.jinja").render(record=record, run=run, worst=worst, count=len(layers))
