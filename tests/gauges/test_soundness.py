"""Displacements that several readers would have to subtract again are refused, known or not."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnfx
from tests.support.graphs import draw_statistics


class Stream(nn.Module):
    """A norm whose output two readers share, and a norm with tiny gammas behind their sum.

    To fold the last one would move what they share by a million standard deviations.
    """

    def __init__(self, *, head: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.first = draw_statistics(nn.BatchNorm2d(4), "plain", 0)
        self.scale = nn.Parameter(torch.rand(1, 4, 1, 1) + 0.5)
        self.offset = nn.Parameter(torch.randn(1, 4, 1, 1))
        self.last = draw_statistics(nn.BatchNorm2d(4), "tiny", 1)
        self.head = nn.Linear(1, 1) if head else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        stream = F.max_pool2d(self.first(self.conv(x)), 2)
        mixed: Tensor = self.last(stream * self.scale + self.offset + stream.flip(1))
        out: Tensor = self.head(F.max_pool2d(mixed, 2))
        return out


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("times", [1, 2])
def test_a_shared_tensor_is_not_moved_by_a_million_deviations(times: int, head: bool) -> None:  # noqa: FBT001  # a parameter of the test
    net, x = Stream(head=head).eval(), torch.randn(2, 4, 6, 6)
    truth = copy.deepcopy(net).double()(x.double())
    folded: nn.Module = net
    for _ in range(times):
        folded = bnfx.fold_bn(folded, (x,), merge_branches=False)
    assert distance(folded(x), truth) <= 8 * max(distance(net(x), truth), 1e-7)
