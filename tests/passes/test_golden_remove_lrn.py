"""RemoveLocalResponseNorm as text."""

from __future__ import annotations

import torch
from torch import nn

from bnfx.passes import RemoveLocalResponseNorm
from tests.support.golden import Golden
from tests.support.networks import chain, conv, net

X = torch.randn(2, 2, 5, 5, dtype=torch.float64)


def test_modules_and_functions_go(golden: Golden) -> None:
    model = net(
        "self.cross(F.local_response_norm(self.lrn(self.conv(x)), 2))",
        conv=conv(2, 2),
        lrn=nn.LocalResponseNorm(2),
        cross=nn.CrossMapLRN2d(2),
    )
    golden.apply(RemoveLocalResponseNorm(), model)


def test_what_is_left(golden: Golden) -> None:
    model = chain(nn.LocalResponseNorm(2), nn.LocalResponseNorm(2))
    model.get_submodule("1").register_forward_hook(lambda *_: None)
    golden.apply(RemoveLocalResponseNorm(exclude="0"), model)


def test_a_function_chosen_by_exclude(golden: Golden) -> None:
    part = net("F.local_response_norm(x, 2)")
    golden.apply(RemoveLocalResponseNorm(exclude="part"), net("self.part(x)", part=part))


def test_the_model_itself(golden: Golden) -> None:
    golden.apply(RemoveLocalResponseNorm(), nn.LocalResponseNorm(2))


def test_out_of_reach(golden: Golden) -> None:
    model = net("F.local_response_norm(x, 2) if x.sum() < 1e9 else x")
    golden.apply(RemoveLocalResponseNorm(), model, X, given=True)


def test_in_a_part_with_optional_arguments(golden: Golden) -> None:
    part = net("F.local_response_norm(x if mask is None else x * mask, 2)", args="x, mask=None")
    golden.apply(RemoveLocalResponseNorm(), net("self.part(x) if x.sum() < 1e9 else x", part=part))
