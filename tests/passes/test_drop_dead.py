"""Channels that count for nothing leave, and the function stays the same."""

from __future__ import annotations

import pytest
import torch

import bnfx
from tests.support.graph_laws import check
from tests.support.sparse import sparse_network


def _size(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("seed", range(8))
def test_random_networks(seed: int) -> None:
    net, x = sparse_network(seed)
    others = [[torch.randn(5, 3, 8, 8, dtype=torch.float64)]]
    check(net, [x], given=bool(seed % 2), others=others, drop_dead=True, block=1 + seed % 3)
    assert _size(bnfx.fold_bn(net, x, drop_dead=True, block=1)) < _size(bnfx.fold_bn(net, x))
