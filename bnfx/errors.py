"""Every error that bnfx raises on purpose.

A message has three parts: what went wrong, where (module path and node), and what to do next.
"""

from __future__ import annotations

from typing import Any

from bnfx.text import printable


class BnfxError(Exception):
    """Base of all errors raised by bnfx on purpose."""

    def __str__(self) -> str:
        return printable(super().__str__())


class CaptureError(BnfxError):
    """The model could not be turned into a graph."""


class NotCapturedError(CaptureError):
    """No graph holds the model, though it runs on the example."""


class InsertError(BnfxError):
    """BatchNorm could not be inserted, or the inserted model is not what it must be."""


class FoldError(BnfxError):
    """Folding could not be carried out, or the folded model is not what it must be.

    Attributes:
        report: The `FoldReport` where BatchNorms stay that must not; else None.
    """

    def __init__(self, message: str, report: Any = None) -> None:
        super().__init__(message)
        self.report = report


class RecipeError(BnfxError):
    """A pass of the recipe did not preserve what it declares, or an option makes no sense."""


class CalibrationError(BnfxError):
    """The data given for statistics is empty, too short, not finite or of the wrong shape."""


class ExportError(BnfxError):
    """The ONNX file could not be written, or would not mean what the model means."""


class VerificationError(BnfxError):
    """The ONNX file does not compute what the reference model computes, or cannot be read.

    Attributes:
        report: The `VerifyReport` or `DeployReport` of what failed; None where it did not get far
            enough for one.
    """

    def __init__(self, message: str, report: Any = None) -> None:
        super().__init__(message)
        self.report = report


class ProviderError(BnfxError):
    """The requested onnxruntime execution provider did not run the graph."""


class UsageError(BnfxError):
    """The command line names something that is not there or cannot be meant."""


class MissingPackageError(BnfxError):
    """A package that the request needs is not installed or does not load."""
