"""Insert BatchNorm into PyTorch networks, fold it away, export to ONNX, verify with onnxruntime.

The public names load on first use, so that `import bnfx` costs no more than `import torch` and
works where onnxruntime is not installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bnfx.text import meant
from bnfx.version import __version__ as __version__

if TYPE_CHECKING:  # the same for type checkers; a test keeps it equal to the table below
    from bnfx import passes as passes
    from bnfx.benchmark import BenchReport as BenchReport
    from bnfx.benchmark import benchmark_onnx as benchmark_onnx
    from bnfx.deployment import DeployReport as DeployReport
    from bnfx.deployment import deploy as deploy
    from bnfx.editing.driver import Edited as Edited
    from bnfx.editing.driver import apply_pass as apply_pass
    from bnfx.environment.doctor import EnvReport as EnvReport
    from bnfx.environment.doctor import doctor as doctor
    from bnfx.errors import BnfxError as BnfxError
    from bnfx.errors import CalibrationError as CalibrationError
    from bnfx.errors import CaptureError as CaptureError
    from bnfx.errors import ExportError as ExportError
    from bnfx.errors import FoldError as FoldError
    from bnfx.errors import InsertError as InsertError
    from bnfx.errors import ProviderError as ProviderError
    from bnfx.errors import RecipeError as RecipeError
    from bnfx.errors import VerificationError as VerificationError
    from bnfx.export import ExportReport as ExportReport
    from bnfx.export import export_onnx as export_onnx
    from bnfx.file_folding import FoldOnnxReport as FoldOnnxReport
    from bnfx.file_folding import fold_onnx as fold_onnx
    from bnfx.folding import fold_bn as fold_bn
    from bnfx.folding import plan_fold as plan_fold
    from bnfx.insertion import insert_bn as insert_bn
    from bnfx.insertion import plan_insert as plan_insert
    from bnfx.inspection import InspectReport as InspectReport
    from bnfx.inspection import inspect_onnx as inspect_onnx
    from bnfx.optimizers import param_groups as param_groups
    from bnfx.prove import ProofReport as ProofReport
    from bnfx.prove import prove_onnx as prove_onnx
    from bnfx.recipes import Hparams as Hparams
    from bnfx.recipes import Recipe as Recipe
    from bnfx.recipes import recipe as recipe
    from bnfx.removal import StageReport as StageReport
    from bnfx.removal import removal_ledger as removal_ledger
    from bnfx.reports.report import Change as Change
    from bnfx.reports.report import FoldReport as FoldReport
    from bnfx.reports.report import InsertReport as InsertReport
    from bnfx.reports.report import report as report
    from bnfx.statistics.calibration import recalibrate_bn as recalibrate_bn
    from bnfx.verification.verdicts import VerifyReport as VerifyReport
    from bnfx.verify import verify_onnx as verify_onnx

#: Module -> the public names that live there.
_PUBLIC = {
    "benchmark": "BenchReport benchmark_onnx",
    "deployment": "DeployReport deploy",
    "editing.driver": "Edited apply_pass",
    "environment.doctor": "EnvReport doctor",
    "errors": "BnfxError CalibrationError CaptureError ExportError FoldError InsertError "
    "ProviderError RecipeError VerificationError",
    "export": "ExportReport export_onnx",
    "file_folding": "FoldOnnxReport fold_onnx",
    "folding": "fold_bn plan_fold",
    "insertion": "insert_bn plan_insert",
    "inspection": "InspectReport inspect_onnx",
    "optimizers": "param_groups",
    "prove": "ProofReport prove_onnx",
    "recipes": "Hparams Recipe recipe",
    "removal": "StageReport removal_ledger",
    "reports.report": "Change FoldReport InsertReport report",
    "statistics.calibration": "recalibrate_bn",
    "verification.verdicts": "VerifyReport",
    "verify": "verify_onnx",
}
_HOME = {name: f"bnfx.{home}" for home, names in _PUBLIC.items() for name in names.split()}
__all__ = [*_HOME, "passes"]


def _load(name: str) -> Any:
    if name == "passes":
        return importlib.import_module("bnfx.passes")
    if name not in _HOME:
        raise AttributeError(f"module 'bnfx' has no attribute {name!r}{meant(name, __all__)}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


if not TYPE_CHECKING:  # a type checker that saw this would accept any name
    __getattr__ = _load


def __dir__() -> list[str]:
    return sorted(__all__)
