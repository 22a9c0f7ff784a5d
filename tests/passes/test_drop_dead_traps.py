"""Networks in which a channel looks dead: what else reads it keeps it, or is told of it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import bnfx
from tests.support.networks import net

#: What a forward returns in which y, four channels, always is 0 in channel 1; and how many of them
#: may be left then.
TRAPS = {
    "self.b(torch.softmax(y, 1))": 4,
    "self.b(y - y.mean(1, keepdim=True))": 4,
    "y.amax(1, keepdim=True)": 4,
    "self.b(y) * y.size(1)": 4,
    "(self.b(y), y.shape[1])": 4,
    "(self.b(y), y[:, :2])": 4,
    "self.b(y + torch.zeros_like(y))": 4,
    "self.b(torch.log(y.abs()))": 4,
    "self.b(torch.where(y > 0, y, -y))": 4,
    "self.b(self.n(y))": 4,
    "self.b(y) * self.a.weight.norm()": 3,  # a number, which the weight of b takes up
    "self.b(y) * torch.sigmoid(x.mean() * self.a.weight.norm())": 4,
    "self.d(F.pad(y, (1, 1, 1, 1), value=2.0))": 4,
    "self.d(F.pad(y, (1, 1, 1, 1)))": 3,
    "self.c(y.reshape(-1, 144))": 3,
    "self.c(y.view(y.size(0), y.size(1) * 36))": 3,
    "self.b(torch.cat(y.chunk(2, 1), 1))": 3,
    "self.e(y[:, -3:])": 2,
    "self.e(y.narrow(1, 1, 3))": 2,
    "self.b(y.flip(1))": 3,
    "self.b(self.p(y))": 3,
    "self.b(y * torch.sigmoid(self.s(y)))": 3,
    "self.b(F.threshold(y, 0.5, 3.0))": 3,
    "self.b(y.mul_(2).add_(y * y))": 4,
    "self.b(F.interpolate(y, scale_factor=2.0))": 3,
    "self.b(y.mean((2, 3), keepdim=True).expand(-1, 4, 6, 6))": 3,
}


def _build(result: str) -> nn.Module:
    torch.manual_seed(0)
    parts: dict[str, Any] = {
        "a": nn.Conv2d(3, 4, 1),
        "b": nn.Conv2d(4, 2, 1),
        "c": nn.Linear(144, 2),
        "d": nn.Conv2d(4, 2, 3),
        "e": nn.Conv2d(3, 2, 1),
        "n": nn.GroupNorm(2, 4),
        "p": nn.PReLU(4),
        "s": nn.Conv2d(4, 1, 1),
    }
    with torch.no_grad():
        parts["a"].weight[1] = 0.0
        parts["a"].bias[1] = 0.0
    return net(
        result, "y = self.a(x)", **{k: v for k, v in parts.items() if f".{k}" in result + ".a"}
    )


@pytest.mark.parametrize("result", TRAPS)
def test_what_reads_a_channel_is_right(result: str) -> None:
    model, x = _build(result), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    folded = bnfx.fold_bn(model, x, drop_dead=True, block=1, merge_linear=False)
    for ours, truth in zip(
        pytree.tree_leaves(folded(x)), pytree.tree_leaves(model(x)), strict=True
    ):
        if isinstance(truth, Tensor):
            torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12, equal_nan=True)
        else:
            assert ours == truth
    assert len(folded.get_parameter("a.weight")) == TRAPS[result]


@pytest.mark.parametrize("seed", range(4))
def test_a_brute_force_finds_no_more(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    widths = [3, 9, 8, 7, 2]
    layers = [nn.Conv2d(i, o, 1) for i, o in itertools.pairwise(widths)]
    with torch.no_grad():
        for layer in layers:
            layer.weight[torch.rand(layer.weight.shape, generator=generator) < 0.6] = 0.0
    model = nn.Sequential(*(m for layer in layers for m in (layer, nn.Tanh()))).double().eval()
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    folded = bnfx.fold_bn(model, x, drop_dead=True, block=1, merge_linear=False)
    for i, width in enumerate(widths[1:-1]):
        alive = sum(_counts(model, 2 * i + 1, c, x) for c in range(width))
        assert len(folded.get_parameter(f"{2 * i}.weight")) == max(1, alive)


def _counts(model: nn.Sequential, at: int, channel: int, x: Tensor) -> bool:
    """Whether a channel behind layer `at` changes with the input, and the output with it."""
    value = model[: at + 1](x)
    if bool((value[:, channel] == value[0, channel, 0, 0]).all()) and bool(
        (model[: at + 1](5 * x)[:, channel] == value[0, channel, 0, 0]).all()
    ):
        return False
    outputs = []
    for size in (0.0, 1e3):
        value[:, channel] = size
        outputs.append(model[at + 1 :](value))
    return not torch.equal(*outputs)
