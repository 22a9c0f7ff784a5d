"""Laws of merging linear maps: whatever is merged is exact, at every size, and costs less."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnfx
from bnfx.reports.report import FoldReport
from tests.support.laws import assert_close, check_fold, randomise

#: A width to which all others round: layers cost by their kernels and places alone.
WIDE = 4096


class Beside(nn.Module):
    """The sum of branches of one tensor."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.branches[0](x)
        for branch in self.branches[1:]:
            total = total + branch(x)
        return total


def merges(model: nn.Module, *inputs: Tensor, block: int = 16) -> int:
    """How many merges `fold_bn` makes; the result computes the same for all inputs."""
    model, inputs = model.double().eval(), tuple(x.double() for x in inputs)
    folded = bnfx.fold_bn(model, inputs[0], block=block)
    for x in inputs:
        assert_close(model, folded, [x])
    told = bnfx.report(folded)
    assert isinstance(told, FoldReport)
    return len(told.merges)


def kernels(rng: random.Random, spatial: int, inputs: int, outputs: int) -> nn.Module:
    """A convolution with a geometry drawn at random."""
    convolution: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial - 1]
    groups = rng.choice([g for g in (1, 1, 2, 4) if inputs % g == 0 == outputs % g])
    draw = [[rng.choice(which) for _ in range(spatial)] for which in ((1, 1, 2, 3), (1, 1, 2))]
    pads = [rng.choice((0, 0, 1, 2)) for _ in range(spatial)]
    dilation = [rng.choice((1, 1, 2)) for _ in range(spatial)]
    bias = rng.random() < 0.4
    return convolution(  # type: ignore[no-any-return]  # one of three classes
        inputs, outputs, draw[0], draw[1], pads, tuple(dilation), groups=groups, bias=bias
    )


def layers(rng: random.Random, spatial: int) -> Iterator[nn.Module]:
    """Linear maps behind each other, drawn at random."""
    width, window = rng.choice((2, 4)), (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[spatial - 1]
    pads = (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)[spatial - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[spatial - 1]
    yield kernels(rng, spatial, 4, width)
    for _ in range(rng.choice((1, 2, 3))):
        kind = rng.choice("cccpzn")
        if kind == "c":
            after = rng.choice((2, 4))
            yield kernels(rng, spatial, width, after)
            width = after
        elif kind == "p":
            yield window(2, 1, rng.choice((0, 1)))
        else:
            yield pads(1) if kind == "z" else norm(width)


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_random_sequences_are_exact(spatial: int) -> None:
    rng, merged = random.Random(spatial), 0
    torch.manual_seed(spatial)
    for _ in range(25):
        model = randomise(nn.Sequential(*layers(rng, spatial)))
        inputs = [torch.randn(1, 4, *[n] * spatial) for n in (15, 18)]
        merged += merges(model, *inputs, block=WIDE)
    assert merged > 5


def test_random_branches_are_exact() -> None:
    rng, merged = random.Random(7), 0
    torch.manual_seed(7)
    for _ in range(25):
        stride, width = rng.choice((1, 1, 2)), rng.choice((2, 4, 8))

        def convolution(inputs: int, outputs: int, k: Any, s: int = 1, p: Any = 0) -> nn.Module:
            bias = rng.random() < 0.3  # called in this round
            return nn.Conv2d(inputs, outputs, k, s, p, bias=bias)

        branches: list[nn.Module] = [
            nn.Sequential(convolution(4, width, 1), convolution(width, 4, 3, stride, 1)),
            nn.Sequential(convolution(4, 4, 1), nn.AvgPool2d(3, stride, 1), nn.BatchNorm2d(4)),
            nn.Sequential(convolution(4, 4, (1, 3), stride, (0, 1)), nn.BatchNorm2d(4)),
            nn.Sequential(
                nn.ZeroPad2d(1), convolution(4, width, 1), convolution(width, 4, 3, stride)
            ),
            convolution(4, 4, 1, stride),
        ]
        chosen = rng.sample(branches, rng.choice((2, 3, 4)))
        model = randomise(nn.Sequential(Beside(*chosen), nn.ReLU()))
        merged += merges(model, *(torch.randn(2, 4, n, n) for n in (11, 14)), block=WIDE)
    assert merged > 5


@pytest.mark.parametrize("kept", ["conv", "linear"])
def test_a_value_that_is_read_twice_stays(kept: str) -> None:
    first, second = (nn.Conv2d(4, 4, 1) if kept == "conv" else nn.Linear(4, 4) for _ in range(2))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = first, second

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            z: Tensor = self.second(y) * y.sum()
            return z

    assert not merges(Net(), torch.randn(2, 4, 4, 4))


def test_shared_weights_stay_for_their_other_readers() -> None:
    shared = nn.Conv2d(4, 4, 1)
    model = nn.Sequential(shared, nn.Conv2d(4, 4, 3), nn.ReLU(), shared, nn.ReLU())
    assert merges(model, torch.randn(2, 4, 8, 8)) == 1


def test_a_merge_survives_folding_again() -> None:
    model = randomise(
        nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))
    )
    assert check_fold(model, torch.randn(2, 4, 8, 8)) == ["folded", "folded"]


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
def test_padding_with_other_values_parts(mode: Any) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 3, padding=1, padding_mode=mode))
    assert not merges(model, torch.randn(2, 4, 8, 8))


def test_dropout_that_drops_parts() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(nn.functional.dropout(self.a(x), 0.5))  # whatever the mode is
            return y

    told = bnfx.plan_fold(Net().eval(), torch.randn(2, 4))
    assert not told.merges
