"""DropDead as text, through fold_bn: channels that leave, and idle ones that stay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.support.golden import Golden
from tests.support.networks import chain, conv, linear, net, norm

X = torch.randn(2, 1, 5, 5, dtype=torch.float64)


def without(layer: Any, *, rows: Any = (), columns: Any = ()) -> Any:
    """The layer with rows, bias included, and columns of zeros."""
    with torch.no_grad():
        layer.weight[list(rows)] = 0.0
        layer.bias[list(rows)] = 0.0
        layer.weight[:, list(columns)] = 0.0
    return layer


def drop(golden: Golden, model: nn.Module, x: Tensor = X, block: int = 1, **options: Any) -> None:
    """The golden text of a network that loses channels, or keeps them."""
    options = {"given": True, "merge_linear": False} | options
    golden.fold(model, x, drop_dead=True, block=block, **options)


def test_a_constant_goes_into_the_bias(golden: Golden) -> None:
    drop(golden, chain(conv(1, 2), norm([1, 0], [1, 3]), nn.ReLU(), conv(2, 1)))


def test_what_nobody_reads(golden: Golden) -> None:
    drop(golden, chain(conv(1, 3), nn.ReLU(), without(conv(3, 2), columns=[0, 2])))


def test_a_constant_carries_others_into_padding(golden: Golden) -> None:
    last = conv(3, 1, 3, padding=1)
    drop(golden, chain(conv(1, 3), norm([1, 0, 0], [1, 2, 4]), nn.ReLU(), last))


def test_a_stream_and_all_that_write_it(golden: Golden) -> None:
    model = net(
        "self.c(torch.relu(y + self.b(torch.relu(y))))",
        "y = self.a(x)",
        a=without(conv(1, 3), rows=[1]),
        b=without(conv(3, 3), rows=[1]),
        c=conv(3, 1),
    )
    drop(golden, model)


def test_through_a_concatenation(golden: Golden) -> None:
    a, b = without(conv(1, 2), rows=[0]), without(conv(1, 2), rows=[1])
    drop(golden, net("self.c(torch.cat((self.a(x), self.b(x)), 1))", a=a, b=b, c=conv(4, 1)))


def test_a_depthwise_layer_and_its_gate(golden: Golden) -> None:
    model = net(
        "self.c(y * torch.sigmoid(self.g(y.mean((2, 3)))).view(-1, 2, 1, 1))",
        "y = torch.relu(self.b(self.a(x)))",
        a=conv(1, 2),
        b=without(conv(2, 2, 3, padding=1, groups=2), rows=[1]),
        g=linear(2, 2),
        c=conv(2, 1),
    )
    drop(golden, model)


def test_flattened_pictures(golden: Golden) -> None:
    model = chain(without(conv(1, 2), rows=[0]), nn.Flatten(), linear(8, 1))
    drop(golden, model, X[..., :2, :2])


def test_groups_lose_equally_many(golden: Golden) -> None:
    grouped = conv(4, 2, groups=2)
    drop(golden, chain(without(conv(1, 4), rows=[0, 3]), grouped, conv(2, 1)))


def test_widths_are_rounded_up(golden: Golden) -> None:
    drop(golden, chain(without(conv(1, 6), rows=[0, 2, 5]), conv(6, 1)), block=4)


def test_without_example_inputs_a_rank_is_checked(golden: Golden) -> None:
    model = net("self.b(self.a(x).mean((2, 3)))", a=without(conv(1, 2), rows=[0]), b=linear(2, 1))
    drop(golden, model, given=False)


# What stays ---------------------------------------------------------------------------------------


def test_the_output_needs_all_channels(golden: Golden) -> None:
    drop(golden, chain(without(conv(1, 2), rows=[0])))


def test_a_layer_reads_it_where_it_is_no_constant(golden: Golden) -> None:
    model = net("self.b(y * x)", "y = torch.sigmoid(self.a(x))", a=conv(1, 2), b=conv(2, 1))
    model.a = without(model.a, rows=[0])
    drop(golden, model)


def test_a_layer_that_is_called_twice(golden: Golden) -> None:
    a = without(conv(1, 2), rows=[0])
    drop(golden, net("self.b(self.a(x)) + self.b(self.a(-x))", a=a, b=conv(2, 1)))


def test_values_that_are_written_in_place(golden: Golden) -> None:
    model = net(
        "self.b(y)",
        "y = self.a(x)",
        "z = y[:, 1:]",
        "y.mul_(2)",
        "y = y + z",
        a=without(conv(1, 2), rows=[0]),
        b=conv(2, 1),
    )
    drop(golden, model)
