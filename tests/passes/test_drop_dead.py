"""Channels that count for nothing leave, and the function stays the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import bnfx
from tests.support.graph_laws import check
from tests.support.networks import chain, conv, norm
from tests.support.sparse import sparse_network


def _size(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("seed", range(8))
def test_random_networks(seed: int) -> None:
    net, x = sparse_network(seed)
    others = [[torch.randn(5, 3, 8, 8, dtype=torch.float64)]]
    check(net, [x], given=bool(seed % 2), others=others, drop_dead=True, block=1 + seed % 3)
    slim = bnfx.fold_bn(net, x, drop_dead=True, block=1)
    assert _size(slim) < _size(bnfx.fold_bn(net, x))
    assert not any(
        drop.verdict == "dropped"
        for drop in bnfx.plan_fold(slim, x, drop_dead=True, block=1).dropped
    )


@pytest.mark.parametrize("form", ["graph", "module"])
def test_survivors_are_an_error_where_that_is_asked_for(form: Any) -> None:
    model = chain(norm([2, 4], [1, 1]), nn.ReLU(), conv(2, 1))
    for fold in (bnfx.fold_bn, bnfx.plan_fold):
        with pytest.raises(bnfx.FoldError, match=r"1 of 1 BatchNorms stay.*\n  0: its s") as caught:
            fold(model, survivors="error", form=form)
        assert caught.value.report.left == 1
    assert bnfx.plan_fold(chain(conv(1, 2), norm([1, 2])), survivors="error").left == 0
    with pytest.raises(bnfx.FoldError, match="choose from batch_norm, error"):
        bnfx.fold_bn(model, survivors="mul_add")  # type: ignore[call-overload]


def test_options_that_make_no_sense() -> None:
    model = chain(conv(1, 2), norm([1, 0]))
    with pytest.raises(bnfx.FoldError, match="use form='graph'"):
        bnfx.fold_bn(model, form="module", drop_dead=True)
    odd: tuple[Any, ...] = (0, "16")
    for block in odd:
        with pytest.raises(bnfx.FoldError, match="is no width"):
            bnfx.fold_bn(model, drop_dead=True, block=block)


@pytest.mark.parametrize("pads", [(0, 0, 0, -1), (0, -1), (1, -1, 0, 0, 0, 0), (0, 0, 0, 0, -1, 0)])
@pytest.mark.parametrize("rows", [(), (8, 4)])
def test_padding_and_cropping_along_any_axis(pads: tuple[int, ...], rows: tuple[int, ...]) -> None:
    """Of the batch, too, which no channel lies along."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(6, 8, dtype=torch.float64), norm([2, 3], [0, 1])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x.reshape(*rows, 6) if rows else x)
            return nn.functional.pad(torch.relu(y), pads[: 2 * y.dim()]) * 2

    net, x = Net().double().eval(), torch.randn(4 if not rows else 32, 6, dtype=torch.float64)
    with torch.no_grad():
        net.first.weight[::2], net.first.bias[::2] = 0, 1
    check(net, [x], given=True, drop_dead=True, block=1)
