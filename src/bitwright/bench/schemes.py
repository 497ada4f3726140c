"""Which scheme each matrix of a model gets when the model as a whole is asked for one, as `bitwright quantize` does it:
what reads the output of the activation function keeps 8 bits where others have 4-bit activations, and counts of outlier
columns are meant for the hidden size and grow with wider inputs."""

from __future__ import annotations

from bitwright.bench.shapes import LinearShape, ModelShape
from bitwright.scheme import BEHIND_ACTIVATION, Scheme

_AFTER_ACTIVATION = "down"


def linear_scheme(linear: LinearShape, shape: ModelShape, scheme: Scheme | None) -> Scheme | None:
    """The scheme of one of `shape.linears`, its outliers counted; None stays None (16 bits)."""
    if scheme is None or scheme.plain:
        return scheme
    if linear.name == _AFTER_ACTIVATION:
        scheme = scheme.behind_activation(Scheme.parse(BEHIND_ACTIVATION))
    return scheme.resolved(linear.K, shape.hidden)
