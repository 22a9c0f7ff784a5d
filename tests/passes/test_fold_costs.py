"""What folding costs, counted: solving where nothing can fold, and weights that nobody needs."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnfx
from bnfx.passes import FoldBatchNorm

_WIDE = (37, 37, 3, 3)  # of no other tensor


class _Block(nn.Module):
    """A layer of branches, one of them in sequence: folded, found to merge, and folded again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv = nn.Conv2d(37, 37, 1, bias=False), nn.Conv2d(37, 37, 3, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(37) for _ in range(3))
        self.beside = nn.Conv2d(37, 37, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 37, H, W) -> (N, 37, H - 2, W - 2)."""
        y = self.norms[1](self.conv(self.norms[0](self.first(x))))
        return torch.relu(y + self.norms[2](self.beside(x)))


def test_folding_keeps_no_weights_that_nobody_has() -> None:
    model, x = _Block().eval(), torch.randn(2, 37, 8, 8)
    gc.collect()
    gc.disable()
    try:
        folded = bnfx.fold_bn(model, x)
        found = [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter)]
    finally:
        gc.enable()
    wide = {t.data_ptr() for t in found if tuple(t.shape) == _WIDE}
    theirs = {t.data_ptr() for m in (model, folded) for t in m.parameters()}
    assert wide <= theirs
    torch.testing.assert_close(folded(x), model(x))


def test_nothing_is_solved_without_a_batch_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(FoldBatchNorm, "_solved", refuse)
    model, x = (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)),
        torch.randn(2, 3, 8, 8),
    )
    folded = bnfx.fold_bn(model.eval(), x)
    assert F.mse_loss(folded(x), model(x)) == 0
