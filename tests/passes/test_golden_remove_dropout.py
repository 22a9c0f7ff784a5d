"""RemoveDropout as text."""

from __future__ import annotations

import torch
from torch import nn

from bnfx.passes import RemoveDropout
from tests.support.golden import Golden
from tests.support.networks import linear, net

X = torch.randn(3, 2, dtype=torch.float64)


def test_modules_leave_their_slot(golden: Golden) -> None:
    model = nn.Sequential(linear(2, 2), nn.Dropout(0.5), nn.Sequential(nn.AlphaDropout(0.2)))
    golden.apply(RemoveDropout(), model)


def test_a_rate_is_reduced(golden: Golden) -> None:
    model = net(
        "F.dropout(self.gru(self.drop(x))[0], 0.3, self.training)",
        drop=nn.Dropout(0.5),
        gru=nn.GRU(2, 2, 2, dropout=0.4),
    )
    golden.apply(RemoveDropout(rate=0.1), model)


def test_functions_leave_the_graph(golden: Golden) -> None:
    golden.apply(
        RemoveDropout(),
        net("F.dropout(x, 0.4, self.training) + torch.dropout(x, 0.2, self.training)").train(),
    )


def test_attention_weights_are_left(golden: Golden) -> None:
    model = net(
        "z + F.scaled_dot_product_attention(y, y, y, dropout_p=rate)",
        "y = self.drop(torch.softmax(x, -1))",
        "z = self.mha(y, y, y)[0]",
        "rate = 0.1 if self.training else 0.0",
        drop=nn.Dropout(0.5),
        mha=nn.MultiheadAttention(2, 1, dropout=0.3),
    )
    golden.apply(RemoveDropout(), model.train())


def test_attention_weights_when_asked_for(golden: Golden) -> None:
    model = net("self.drop(torch.softmax(x, -1))", drop=nn.Dropout(0.5))
    golden.apply(RemoveDropout(attention=True), model)


def test_what_drops_in_eval_mode_too(golden: Golden) -> None:
    golden.apply(RemoveDropout(), net("F.dropout(x)"))


def test_a_computed_rate(golden: Golden) -> None:
    golden.apply(RemoveDropout(), net("F.dropout(x, x.shape[0] / 10, self.training)"))


def test_chosen_by_exclude(golden: Golden) -> None:
    model = net("F.dropout(self.drop(x), 0.1, self.training)", drop=nn.Dropout(0.5)).train()
    golden.apply(RemoveDropout(exclude=["drop", ""]), model)


def test_out_of_reach(golden: Golden) -> None:
    model = net("F.dropout(x, 0.5, self.training) if x.sum() < 1e9 else x")
    golden.apply(RemoveDropout(), model, X, given=True)


def test_not_looked_for_without_an_example(golden: Golden) -> None:
    golden.apply(RemoveDropout(), net("F.dropout(x, 0.5, self.training) if x.sum() < 1e9 else x"))


def test_in_a_part_with_optional_arguments(golden: Golden) -> None:
    part = net(
        "F.dropout(x if mask is None else x * mask, 0.5, self.training)", args="x, mask=None"
    )
    golden.apply(RemoveDropout(), net("self.part(x) if x.sum() < 1e9 else x", part=part).train())
