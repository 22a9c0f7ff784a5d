"""ZeroInitResidual as text."""

from __future__ import annotations

from typing import Any

from torch import nn

from bnfx.passes import ZeroInitResidual
from tests.support.golden import Golden
from tests.support.networks import chain, conv, net, norm


def block(
    bn: Any, result: str = "torch.relu(x + self.bn(self.conv(x)))", **parts: Any
) -> nn.Module:
    return net(result, conv=conv(2, 2), bn=bn, **parts)


def test_the_last_gamma_of_a_branch(golden: Golden) -> None:
    golden.apply(ZeroInitResidual(), block(nn.BatchNorm2d(2)))


def test_beside_a_projection(golden: Golden) -> None:
    result = "torch.relu(self.short(x) + self.bn(self.conv(torch.relu(self.first(x)))))"
    golden.apply(
        ZeroInitResidual(), block(nn.BatchNorm2d(2), result, short=conv(2, 2), first=conv(2, 2))
    )


def test_a_branch_that_ends_with_an_operator(golden: Golden) -> None:
    golden.apply(
        ZeroInitResidual(), block(nn.BatchNorm2d(2), "x + torch.relu(self.bn(self.conv(x)))")
    )


def test_a_branch_that_ends_with_a_layer(golden: Golden) -> None:
    golden.apply(ZeroInitResidual(), block(nn.BatchNorm2d(2), "x + self.conv(self.bn(x))"))


def test_two_long_sides(golden: Golden) -> None:
    side = chain(conv(2, 2), conv(2, 2))
    result = "self.side(x) + self.bn(self.conv(self.a(self.b(x))))"
    golden.apply(
        ZeroInitResidual(), block(nn.BatchNorm2d(2), result, side=side, a=conv(2, 2), b=conv(2, 2))
    )


def test_its_output_is_used_elsewhere(golden: Golden) -> None:
    golden.apply(
        ZeroInitResidual(),
        net("x + y, y", "y = self.bn(self.conv(x))", conv=conv(2, 2), bn=nn.BatchNorm2d(2)),
    )


def test_chosen_by_exclude(golden: Golden) -> None:
    golden.apply(ZeroInitResidual(exclude="b*"), block(nn.BatchNorm2d(2)))


def test_without_gamma(golden: Golden) -> None:
    golden.apply(ZeroInitResidual(), block(nn.BatchNorm2d(2, affine=False)))


def test_gamma_is_zero_already(golden: Golden) -> None:
    golden.apply(ZeroInitResidual(), block(norm([0, 0])))


def test_a_trained_gamma(golden: Golden) -> None:
    golden.apply(ZeroInitResidual(), block(norm([1, 0.5])))


def test_trained_statistics(golden: Golden) -> None:
    golden.apply(ZeroInitResidual(), block(norm([1, 1], mean=[0, 0.5])))


def test_no_statistics_to_tell(golden: Golden) -> None:
    golden.apply(ZeroInitResidual(), block(nn.BatchNorm2d(2, track_running_stats=False)))


def test_on_the_meta_device(golden: Golden) -> None:
    golden.apply(ZeroInitResidual(), block(nn.BatchNorm2d(2)).to("meta"))
