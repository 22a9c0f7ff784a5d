"""Insert BatchNorm into PyTorch networks, fold it away, export to ONNX, verify with onnxruntime.

The public names load on first use, so that `import bnfx` costs no more than `import torch` and
works where onnxruntime is not installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bnfx import passes
    from bnfx.benchmark import BenchReport, benchmark_onnx
    from bnfx.calibration import recalibrate_bn
    from bnfx.editing import Change, Edited, apply_pass
    from bnfx.errors import (
        BnfxError,
        CalibrationError,
        CaptureError,
        ExportError,
        FoldError,
        InsertError,
        ProviderError,
        RecipeError,
        VerificationError,
    )
    from bnfx.export import ExportReport, export_onnx
    from bnfx.folding import fold_bn, plan_fold
    from bnfx.insertion import insert_bn, plan_insert
    from bnfx.optimizers import param_groups
    from bnfx.recipes import Hparams, Recipe, recipe
    from bnfx.reports import FoldReport, InsertReport, report
    from bnfx.verify import VerifyReport, verify_onnx

__version__ = "0.1.0"

__all__ = [
    "BenchReport",
    "BnfxError",
    "CalibrationError",
    "CaptureError",
    "Change",
    "Edited",
    "ExportError",
    "ExportReport",
    "FoldError",
    "FoldReport",
    "Hparams",
    "InsertError",
    "InsertReport",
    "ProviderError",
    "Recipe",
    "RecipeError",
    "VerificationError",
    "VerifyReport",
    "apply_pass",
    "benchmark_onnx",
    "export_onnx",
    "fold_bn",
    "insert_bn",
    "param_groups",
    "passes",
    "plan_fold",
    "plan_insert",
    "recalibrate_bn",
    "recipe",
    "report",
    "verify_onnx",
]

#: Where each public name lives; a test keeps this, `__all__` and the imports above equal.
_HOME = {
    "BenchReport": "bnfx.benchmark",
    "BnfxError": "bnfx.errors",
    "CalibrationError": "bnfx.errors",
    "CaptureError": "bnfx.errors",
    "Change": "bnfx.editing",
    "Edited": "bnfx.editing",
    "ExportError": "bnfx.errors",
    "ExportReport": "bnfx.export",
    "FoldError": "bnfx.errors",
    "FoldReport": "bnfx.reports",
    "Hparams": "bnfx.recipes",
    "InsertError": "bnfx.errors",
    "InsertReport": "bnfx.reports",
    "ProviderError": "bnfx.errors",
    "Recipe": "bnfx.recipes",
    "RecipeError": "bnfx.errors",
    "VerificationError": "bnfx.errors",
    "VerifyReport": "bnfx.verify",
    "apply_pass": "bnfx.editing",
    "benchmark_onnx": "bnfx.benchmark",
    "export_onnx": "bnfx.export",
    "fold_bn": "bnfx.folding",
    "insert_bn": "bnfx.insertion",
    "param_groups": "bnfx.optimizers",
    "plan_fold": "bnfx.folding",
    "plan_insert": "bnfx.insertion",
    "recalibrate_bn": "bnfx.calibration",
    "recipe": "bnfx.recipes",
    "report": "bnfx.reports",
    "verify_onnx": "bnfx.verify",
}


def _load(name: str) -> Any:
    if name == "passes":
        return importlib.import_module("bnfx.passes")
    if name not in _HOME:
        raise AttributeError(f"module 'bnfx' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


if not TYPE_CHECKING:  # a type checker that saw this would accept any name
    __getattr__ = _load


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
