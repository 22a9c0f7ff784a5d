"""The budget is of the precision asked for, whatever PyTorch is allowed to compute in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bnfx
from bnfx import verify
from bnfx.graphs.examples import Example
from bnfx.numbers import relative_error
from bnfx.verification.references import (
    Tf32,
    TorchReference,
    strict_float32,
    to_tf32,
    to_tf32_truncated,
)
from bnfx.verification.verdicts import VerifyReport

BACKENDS: Any = torch.backends


def allowed() -> list[str | bool]:
    """What products may be computed in, by the newer words and by the older."""
    newer = [BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn, BACKENDS.cuda.matmul]
    newer += [BACKENDS.mkldnn.conv, BACKENDS.mkldnn.rnn, BACKENDS.mkldnn.matmul]
    older = (lambda: BACKENDS.cudnn.allow_tf32, torch.get_float32_matmul_precision)
    return [backend.fp32_precision for backend in newer] + [_read(read) for read in older]


def _read(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except RuntimeError:
        return "mixed"


class Told(nn.Module):
    """Tells what its products may be computed in."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.found = allowed()
        return x


def users_choices() -> list[Callable[[], None]]:
    def mixed() -> None:
        BACKENDS.cudnn.conv.fp32_precision = "ieee"
        BACKENDS.cuda.matmul.fp32_precision = "tf32"

    return [
        lambda: None,
        lambda: torch.set_float32_matmul_precision("high"),
        lambda: torch.set_float32_matmul_precision("medium"),
        lambda: setattr(BACKENDS.mkldnn.conv, "fp32_precision", "bf16"),
        mixed,
    ]


@pytest.mark.parametrize("choose", users_choices())
def test_the_reference_computes_in_float32_proper(choose: Callable[[], None]) -> None:
    with strict_float32():
        choose()
        before = allowed()
        model = Told().eval()
        reference = TorchReference(model, "fp32", 1)
        reference._call(model, Example((torch.ones(1),), {}), None)
        assert set(model.found) <= {"ieee", "none", False, "highest"}
        assert allowed() == before


def test_tf32_may_be_cut_off() -> None:
    x = torch.tensor([1 + 2.0**-12, 1 + 3 * 2.0**-12, -1 - 3 * 2.0**-12, 1 + 2.0**-10, 3e38])
    nearest = torch.tensor([1.0, 1 + 2.0**-10, -1 - 2.0**-10, 1 + 2.0**-10, 3e38])
    cut = torch.tensor([1.0, 1.0, -1.0, 1 + 2.0**-10, 3e38])
    assert torch.equal(to_tf32(x)[:4], nearest[:4])
    assert torch.equal(to_tf32_truncated(x)[:4], cut[:4])
    layer, given = nn.Linear(256, 8).eval(), Example((torch.rand(4, 256),), {})
    with torch.no_grad():
        layer.weight.abs_()
    reference = TorchReference(layer, "tf32", 1)
    runs = reference.run([given])
    (truncated,) = reference.truncated([given], runs)
    # Cutting off loses up to twice as much, and of positive numbers always the same way.
    cut_off = relative_error(truncated, runs.exact[0])
    assert cut_off > 4 * relative_error(runs.rounded[0], runs.exact[0]) > 0


class Positive(nn.Module):
    """Layers of positive numbers, whose sums lose the same way each time that they are cut off."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1) for _ in range(4)))
        with torch.no_grad():
            for weight in self.parameters():
                weight.abs_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers(x.abs()).mean((2, 3))
        return out


@pytest.mark.parametrize("by", ["module", "file"])
def test_what_a_gpu_cuts_off_is_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """Tensor cores may cut factors off: then the budget does so too."""
    model, x = Positive().eval(), torch.randn(2, 16, 8, 8)
    bnfx.export_onnx(model, x, tmp_path / "net.onnx")
    real, told = verify._run, {"truncated": True}

    def on_a_gpu(plan: Any, **how: Any) -> Any:
        staged, answer = real(plan, **how)
        with torch.no_grad(), Tf32(to_tf32_truncated):
            results: Any = [[model(*sample.args).numpy()] for sample in plan.samples]
        return staged, replace(answer, results=results, proof={**answer.proof, **told})

    monkeypatch.setattr(verify, "_run", on_a_gpu)
    against = model if by == "module" else tmp_path / "net.onnx"

    def check() -> VerifyReport:
        return bnfx.verify_onnx(against, tmp_path / "net.onnx", x, precision="tf32", num_inputs=2)

    assert check(), str(check())
    told["truncated"] = False
    assert not check()  # held to rounding, it is off by more than rounding is
    assert not bnfx.verify_onnx(against, tmp_path / "net.onnx", x, num_inputs=2)
