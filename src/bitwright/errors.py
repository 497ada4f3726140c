"""One small tree of errors. Every message names the layer or file, the value, the limit and the way out."""

from __future__ import annotations


class BitwrightError(Exception):
    """Base of everything bitwright raises on purpose; the command line prints it as one line and exits with 1."""


class SchemeError(BitwrightError):
    """A scheme string or a combination of scheme options that has no meaning here."""


class RecipeError(BitwrightError):
    """A recipe file that cannot be read, or a rule that matches nothing."""


class NumericsError(BitwrightError):
    """NaN or Inf in weights, activations or Hessians."""


class CheckpointError(BitwrightError):
    """A source folder that is missing, truncated, inconsistent or refused (pickled weights)."""


class StructureError(BitwrightError):
    """A model whose blocks or linears cannot be understood."""


class CalibrationError(BitwrightError):
    """Calibration or evaluation text that is missing, unreadable or too short."""


class FormatError(BitwrightError):
    """A result that the chosen checkpoint format cannot express, or a quantized checkpoint that is malformed."""


class OutputError(BitwrightError):
    """An output folder that cannot be used or written (holds another run, disk full, no permission)."""


class DependencyError(BitwrightError):
    """An optional package that this call needs is not installed; the message names the extra to install."""
