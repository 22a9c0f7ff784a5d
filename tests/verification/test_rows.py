"""What the reference computes in float64 once is not computed again, where it is the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bnfx
from bnfx.graphs.examples import Example
from bnfx.verification.samples import resized, rows_of
from tests.support.laws import randomise

DYNAMIC = ({0: "batch"},)
RUNS: list[tuple[torch.dtype, int]] = []


class Rows(nn.Module):
    """A network that tells of every run, whose rows know of each other as `mix` says."""

    def __init__(self, mix: float) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and type(x) is Tensor:
            RUNS.append((x.dtype, x.shape[0]))
        y: Tensor = self.bn(self.conv(x)).relu().mean((2, 3))
        return torch.add(y, y.mean(0, keepdim=True), alpha=self.mix)


def batches_in_float64(mix: float, folder: Path, args: Tensor) -> tuple[list[int], bool]:
    model, f = randomise(Rows(mix)), folder / "rows.onnx"
    bnfx.export_onnx(bnfx.fold_bn(model, args), args, f, dynamic_shapes=DYNAMIC)
    RUNS.clear()
    report = bnfx.verify_onnx(model, f, args, localize=False, isolate=False)
    return [size for dtype, size in RUNS if dtype is torch.float64], bool(report)


@pytest.mark.parametrize("batch", [1, 3])
def test_rows_are_computed_once(tmp_path: Path, batch: int) -> None:
    sizes, passed = batches_in_float64(0.0, tmp_path, torch.randn(batch, 2, 6, 6))
    assert passed
    assert {size for size in sizes if size != batch} == set()


@pytest.mark.parametrize("mix", [1.0, 1e-2, 1e-5])
def test_rows_that_know_of_each_other_are_computed(tmp_path: Path, mix: float) -> None:
    sizes, passed = batches_in_float64(mix, tmp_path, torch.randn(1, 2, 6, 6))
    assert passed
    assert {2, 7} <= set(sizes)


def test_a_file_that_is_wrong_in_other_batches_fails(tmp_path: Path) -> None:
    f, x = tmp_path / "wrong.onnx", torch.randn(1, 2, 6, 6)
    wrong = randomise(Rows(0.5))
    bnfx.export_onnx(bnfx.fold_bn(wrong, x), x, f, dynamic_shapes=DYNAMIC)

    class Right(Rows):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.bn(self.conv(x)).relu().mean((2, 3))
            return torch.add(y, y, alpha=self.mix)  # the same, for one row

    model = Right(0.5).eval()
    model.load_state_dict(wrong.state_dict())
    assert bnfx.verify_onnx(model, f, x, batch_sizes=(1,), isolate=False)
    report = bnfx.verify_onnx(model, f, x, isolate=False)
    assert [check.passed for check in report.outputs] == [True, False, False]


def test_rows_are_those_of_the_resized_input() -> None:
    samples = [Example((torch.randn(3, 2),), {"mask": torch.randn(3, 5)}) for _ in range(4)]
    for size in (1, 2, 7, 30):
        made, rows = resized(samples, size), rows_of(samples, size)
        assert rows is not None
        for place, (i, j) in enumerate(rows):
            assert torch.equal(made.args[0][place], samples[i].args[0][j])
            assert torch.equal(made.kwargs["mask"][place], samples[i].kwargs["mask"][j])
    assert (
        rows_of([*samples, Example((torch.randn(3, 3),), {"mask": torch.randn(3, 5)})], 2) is None
    )
