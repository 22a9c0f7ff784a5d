"""MergeBranches as text, through fold_bn: sums of linear branches, and sums that stay."""

from __future__ import annotations

import torch

from tests.support.golden import Golden
from tests.support.networks import conv, linear, net, norm

X = torch.randn(2, 2, 5, 5, dtype=torch.float64)


def test_a_smaller_kernel_goes_into_a_larger_one(golden: Golden) -> None:
    golden.fold(net("self.a(x) + self.b(x)", a=conv(1, 1, 3, padding=1), b=conv(1, 1)), X[:, :1])


def test_an_identity_is_a_kernel(golden: Golden) -> None:
    golden.fold(net("x + self.a(x)", a=conv(2, 2)), X, given=True)


def test_batch_norms_go_with_their_branches(golden: Golden) -> None:
    model = net(
        "self.n(x) + self.m(self.a(x)) + self.b(x)",
        a=conv(2, 2),
        b=conv(2, 2, bias=False),
        n=norm([2, 4], [1, 1]),
        m=norm([3, 5]),
    )
    golden.fold(model, X)


def test_depthwise_into_dense(golden: Golden) -> None:
    golden.fold(net("self.a(x) + self.b(x)", a=conv(2, 2), b=conv(2, 2, groups=2)), X)


def test_a_constant_goes_into_the_bias(golden: Golden) -> None:
    model = net("self.a(x) + self.b(x) + self.c", a=conv(2, 2), b=conv(2, 2), c=torch.ones(2, 1, 1))
    golden.fold(model, X)


def test_linear_layers(golden: Golden) -> None:
    golden.fold(net("self.a(x) + self.b(x)", a=linear(2, 2), b=linear(2, 2)), X[..., :2])


def test_a_depthwise_kernel_does_not_grow_a_dense_one(golden: Golden) -> None:
    model = net("self.a(x) + self.b(x)", a=conv(2, 2), b=conv(2, 2, 3, padding=1, groups=2))
    golden.fold(model, X)


def test_other_inputs_stay_apart(golden: Golden) -> None:
    golden.fold(net("self.a(x) + self.b(torch.relu(x))", a=conv(2, 2), b=conv(2, 2)), X)


def test_other_strides_stay_apart(golden: Golden) -> None:
    model = net("self.a(x) + self.b(x)[..., :3, :3]", a=conv(2, 2, stride=2), b=conv(2, 2))
    golden.fold(model, X, given=True)


def test_a_branch_that_others_read_stays(golden: Golden) -> None:
    golden.fold(net("y + self.b(x), y", "y = self.a(x)", a=conv(2, 2), b=conv(2, 2)), X)


def test_a_branch_that_drops_stays(golden: Golden) -> None:
    golden.fold(net("self.a(x) + F.dropout(self.b(x), 0.5)", a=conv(2, 2), b=conv(2, 2)))


def test_not_asked_for(golden: Golden) -> None:
    golden.fold(net("self.a(x) + self.b(x)", a=conv(2, 2), b=conv(2, 2)), X, merge_branches=False)
