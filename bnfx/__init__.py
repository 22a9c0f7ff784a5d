"""Insert BatchNorm into PyTorch networks, fold it away, export to ONNX, verify with onnxruntime.

The public names load on first use, so that `import bnfx` costs no more than `import torch` and
works where onnxruntime is not installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bnfx.version import __version__ as __version__

if TYPE_CHECKING:
    from bnfx import passes
    from bnfx.benchmark import BenchReport, benchmark_onnx
    from bnfx.deployment import DeployReport, deploy
    from bnfx.editing.driver import Edited, apply_pass
    from bnfx.environment.doctor import EnvReport, doctor
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
    from bnfx.inspection import InspectReport, inspect_onnx
    from bnfx.optimizers import param_groups
    from bnfx.recipes import Hparams, Recipe, recipe
    from bnfx.removal import StageReport, removal_ledger
    from bnfx.reports.report import Change, FoldReport, InsertReport, report
    from bnfx.statistics.calibration import recalibrate_bn
    from bnfx.verification.verdicts import VerifyReport
    from bnfx.verify import verify_onnx


__all__ = [
    "BenchReport",
    "BnfxError",
    "CalibrationError",
    "CaptureError",
    "Change",
    "DeployReport",
    "Edited",
    "EnvReport",
    "ExportError",
    "ExportReport",
    "FoldError",
    "FoldReport",
    "Hparams",
    "InsertError",
    "InsertReport",
    "InspectReport",
    "ProviderError",
    "Recipe",
    "RecipeError",
    "StageReport",
    "VerificationError",
    "VerifyReport",
    "apply_pass",
    "benchmark_onnx",
    "deploy",
    "doctor",
    "export_onnx",
    "fold_bn",
    "insert_bn",
    "inspect_onnx",
    "param_groups",
    "passes",
    "plan_fold",
    "plan_insert",
    "recalibrate_bn",
    "recipe",
    "removal_ledger",
    "report",
    "verify_onnx",
]

#: Where each public name lives; a test keeps this, `__all__` and the imports above equal.
_HOME = {
    "BenchReport": "bnfx.benchmark",
    "BnfxError": "bnfx.errors",
    "CalibrationError": "bnfx.errors",
    "CaptureError": "bnfx.errors",
    "Change": "bnfx.reports.report",
    "DeployReport": "bnfx.deployment",
    "Edited": "bnfx.editing.driver",
    "EnvReport": "bnfx.environment.doctor",
    "ExportError": "bnfx.errors",
    "ExportReport": "bnfx.export",
    "FoldError": "bnfx.errors",
    "FoldReport": "bnfx.reports.report",
    "Hparams": "bnfx.recipes",
    "InsertError": "bnfx.errors",
    "InsertReport": "bnfx.reports.report",
    "InspectReport": "bnfx.inspection",
    "ProviderError": "bnfx.errors",
    "Recipe": "bnfx.recipes",
    "RecipeError": "bnfx.errors",
    "StageReport": "bnfx.removal",
    "VerificationError": "bnfx.errors",
    "VerifyReport": "bnfx.verification.verdicts",
    "apply_pass": "bnfx.editing.driver",
    "benchmark_onnx": "bnfx.benchmark",
    "deploy": "bnfx.deployment",
    "doctor": "bnfx.environment.doctor",
    "export_onnx": "bnfx.export",
    "fold_bn": "bnfx.folding",
    "insert_bn": "bnfx.insertion",
    "inspect_onnx": "bnfx.inspection",
    "param_groups": "bnfx.optimizers",
    "plan_fold": "bnfx.folding",
    "plan_insert": "bnfx.insertion",
    "recalibrate_bn": "bnfx.statistics.calibration",
    "recipe": "bnfx.recipes",
    "removal_ledger": "bnfx.removal",
    "report": "bnfx.reports.report",
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
