"""insert_bn as text: where a BatchNorm goes, what becomes of the bias, why a layer gets none."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.support.golden import Golden
from tests.support.networks import chain, conv, linear, net, numbered

X = torch.randn(2, 2, 5, 5, dtype=torch.float64)
ROWS = torch.randn(3, 2, dtype=torch.float64)


# Where one goes -----------------------------------------------------------------------------------


def test_between_a_layer_and_its_nonlinearity(golden: Golden) -> None:
    golden.insert(chain(conv(2, 2), nn.ReLU(), conv(2, 1)), X)


def test_fresh_is_gamma_one(golden: Golden) -> None:
    golden.insert(chain(conv(2, 2), nn.ReLU(), conv(2, 1)), X, init="fresh")


def test_rows_are_flattened_for_a_linear_layer(golden: Golden) -> None:
    golden.insert(chain(linear(2, 2), nn.GELU(), linear(2, 1)), ROWS)


def test_through_pooling_dropout_and_a_residual_add(golden: Golden) -> None:
    model = net(
        "torch.relu(x + self.drop(self.pool(self.layer(x)))).mean()",
        layer=conv(2, 2),
        pool=nn.MaxPool2d(1),
        drop=nn.Dropout(),
    )
    golden.insert(model, X)


def test_one_for_each_call(golden: Golden) -> None:
    model = net(
        "self.out(torch.relu(self.fc(torch.relu(self.fc(x)))))", fc=linear(2, 2), out=linear(2, 2)
    )
    golden.insert(model, ROWS)


def test_a_bias_that_another_call_needs_stays(golden: Golden) -> None:
    golden.insert(net("self.fc(torch.relu(self.fc(x)))", fc=linear(2, 2)), ROWS)


def test_behind_the_nonlinearity(golden: Golden) -> None:
    golden.insert(chain(conv(2, 2), nn.ReLU(), conv(2, 1)), X, placement="post_activation")


def test_a_function_with_parameters(golden: Golden) -> None:
    model = net(
        "torch.relu(F.linear(x, self.weight, self.bias)) @ self.out",
        weight=nn.Parameter(torch.ones(2, 2)),
        bias=nn.Parameter(torch.tensor([3.0, 4.0])),
        out=torch.ones(2),
    )
    golden.insert(model, ROWS)


def test_in_the_slot_of_a_layer(golden: Golden) -> None:
    model = net("y * 2 if y.sum() > 1e9 else y", "y = torch.relu(self.fc(x))", fc=linear(2, 2))
    golden.insert(model, ROWS, given=True, form="module")


# Where none goes ----------------------------------------------------------------------------------


def test_the_output_head(golden: Golden) -> None:
    golden.insert(chain(linear(2, 2), nn.ReLU(), linear(2, 2), nn.Sigmoid()), ROWS)


def test_normalised_already(golden: Golden) -> None:
    golden.insert(
        chain(conv(2, 2), nn.BatchNorm2d(2), nn.ReLU(), conv(2, 2), nn.GroupNorm(1, 2), nn.ReLU()),
        X,
    )


def test_normalised_behind_an_add(golden: Golden) -> None:
    model = net(
        "self.out(self.norm(x + self.fc(x)))",
        fc=linear(2, 2),
        norm=nn.LayerNorm(2),
        out=linear(2, 2),
    )
    golden.insert(model, ROWS)


def test_query_and_key_feed_no_nonlinearity(golden: Golden) -> None:
    model = net("torch.softmax(self.q(x) @ self.k(x).mT, -1) @ x", q=linear(2, 2), k=linear(2, 2))
    golden.insert(model, ROWS)


def test_a_tied_weight(golden: Golden) -> None:
    model: Any = net("self.b(torch.relu(self.a(x)))", a=linear(2, 2), b=linear(2, 2))
    model.b.weight = model.a.weight
    golden.insert(model, ROWS)


def test_a_weight_that_an_operator_reads(golden: Golden) -> None:
    golden.insert(net("torch.relu(self.a(x)) + self.a.weight.norm()", a=linear(2, 2)), ROWS)


def test_a_complex_weight(golden: Golden) -> None:
    layer = numbered(nn.Linear(2, 2, dtype=torch.complex128))
    golden.insert(nn.Sequential(layer, nn.ReLU()).eval())


def test_without_the_input_there_is_no_batch(golden: Golden) -> None:
    model = net(
        "x + torch.relu(self.a(self.query))", a=linear(2, 2), query=nn.Parameter(torch.ones(1, 2))
    )
    golden.insert(model, ROWS)


def test_chosen_by_include_and_exclude(golden: Golden) -> None:
    model = chain(linear(2, 2), nn.ReLU(), linear(2, 2), nn.ReLU(), linear(2, 2), nn.ReLU())
    golden.insert(model, ROWS, include=["0", "2"], exclude="2")


def test_never_called(golden: Golden) -> None:
    model = net("torch.relu(self.a(x))", a=linear(2, 2), b=linear(2, 2))
    golden.insert(model, ROWS)


def test_not_called_on_the_example(golden: Golden) -> None:
    model = net("torch.relu(self.a(x))", a=linear(2, 2), b=linear(2, 2))
    golden.insert(model, ROWS, given=True)


def test_a_weight_that_goes_elsewhere(golden: Golden) -> None:
    model = net("torch.relu(self.a(x)) * self.b.weight.sum()", a=linear(2, 2), b=linear(2, 2))
    golden.insert(model, ROWS)


def test_a_weight_that_is_computed(golden: Golden) -> None:
    model = net(
        "torch.relu(F.linear(x, self.weight * 2 + x.sum()))",
        weight=nn.Parameter(torch.ones(2, 2)),
        a=linear(2, 2),
    )
    golden.insert(model, ROWS)


def test_two_nonlinearities_have_no_one_place_behind(golden: Golden) -> None:
    model = net("torch.relu(y) + torch.tanh(y)", "y = self.a(x)", a=linear(2, 2))
    golden.insert(model, ROWS, placement="post_activation")


def test_channels_that_move_before_the_nonlinearity(golden: Golden) -> None:
    model = net("torch.relu(self.a(x).transpose(0, 1))", a=linear(2, 2))
    golden.insert(model, ROWS, placement="post_activation")


def test_normalised_behind_the_nonlinearity(golden: Golden) -> None:
    model = chain(linear(2, 2), nn.ReLU(), nn.LayerNorm(2), linear(2, 2))
    golden.insert(model, ROWS, placement="post_activation")


def test_a_nonlinearity_that_two_layers_share(golden: Golden) -> None:
    model = net("torch.relu(self.a(x) + self.b(x))", a=linear(2, 2), b=linear(2, 2))
    golden.insert(model, ROWS, placement="post_activation")


# What cannot be traced ----------------------------------------------------------------------------


def test_out_of_reach_without_an_example(golden: Golden) -> None:
    inner = net("x * 2 if x.sum() > 1e9 else self.fc(x)", fc=linear(2, 2))
    golden.insert(
        net("torch.relu(self.inner(self.first(x)))", first=linear(2, 2), inner=inner), ROWS
    )


def test_inside_a_module_that_is_kept_whole(golden: Golden) -> None:
    attention = nn.MultiheadAttention(2, 1)
    golden.insert(
        net("self.fc(torch.relu(self.attention(x, x, x)[0]))", attention=attention, fc=linear(2, 2))
    )


def test_never_called_in_a_part_of_what_is_not_traced(golden: Golden) -> None:
    part = net("torch.relu(self.a(x))", a=linear(2, 2), b=linear(2, 2))
    golden.insert(
        net("y * 2 if y.sum() > 1e9 else y", "y = self.part(x)", part=part), ROWS, form="module"
    )


def test_its_output_leaves_a_part_that_is_traced(golden: Golden) -> None:
    part = chain(linear(2, 2), nn.ReLU(), linear(2, 2))
    golden.insert(
        net("y * 2 if y.sum() > 1e9 else y", "y = self.part(x)", part=part), ROWS, form="module"
    )


def test_behind_the_nonlinearity_in_a_part_of_what_is_not_traced(golden: Golden) -> None:
    part = net("torch.relu(self.fc(x))", fc=linear(2, 2))
    model = net("y * 2 if y.sum() > 1e9 else y", "y = self.part(x)", part=part)
    golden.insert(model, ROWS, placement="post_activation", form="module")


def test_called_twice_from_code_that_is_not_traced(golden: Golden) -> None:
    model = net(
        "y",
        "y = torch.relu(self.fc(x))",
        "y = torch.relu(self.fc(y)) if x.sum() < 1e9 else y",
        fc=linear(2, 2),
    )
    golden.insert(model, ROWS, given=True, form="module")


def test_its_nonlinearity_is_in_code_that_is_not_traced(golden: Golden) -> None:
    model = net("y * 2 if y.sum() > 1e9 else y", "y = torch.relu(self.fc(x))", fc=linear(2, 2))
    golden.insert(model, ROWS, given=True, placement="post_activation", form="module")


def test_a_function_in_code_that_is_not_traced(golden: Golden) -> None:
    model = net(
        "y * 2 if y.sum() > 1e9 else y",
        "y = torch.relu(F.linear(x, self.w))",
        w=nn.Parameter(torch.ones(2, 2)),
    )
    golden.insert(model, ROWS, given=True, form="module")
