"""fold_bn(form="module") as text: what a copy of the user's class carries, and what it cannot."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from tests.support.golden import Golden
from tests.support.networks import chain, conv, linear, net, norm, numbered

Parts = dict[str, Any]
X = torch.randn(2, 2, 5, 5, dtype=torch.float64)
ROWS = torch.randn(3, 2, dtype=torch.float64)


def fold(golden: Golden, model: nn.Module, *inputs: Tensor) -> None:
    golden.fold(model, *inputs, given=True, form="module")


def test_a_layer_gets_a_bias_and_the_norm_becomes_an_identity(golden: Golden) -> None:
    fold(golden, chain(conv(2, 2, bias=False), norm([2, 4], [1, -1])), X)


def test_a_layer_called_twice_serves_one_norm(golden: Golden) -> None:
    lines = ["x = self.a(self.conv(x))", "x = self.b(self.conv(torch.sigmoid(x)))"]
    parts: Parts = {"conv": conv(2, 2), "a": norm([2, 4]), "b": norm([3, 5])}
    fold(golden, net("x", *lines, **parts), X)


def test_a_norm_called_twice_of_which_one_call_stays(golden: Golden) -> None:
    parts: Parts = {"conv": conv(2, 2), "norm": norm([2, 4]), "k": torch.ones(1, 2, 1, 1)}
    fold(golden, net("self.norm(self.conv(x)) + self.norm(self.k)", **parts), X)


def test_a_layer_called_twice_before_different_maps(golden: Golden) -> None:
    parts: Parts = {"conv": conv(2, 2), "norm": norm([2, 4])}
    fold(golden, net("self.norm(self.conv(x)) + torch.sigmoid(self.conv(x))", **parts), X)


def test_a_weight_that_is_read_elsewhere(golden: Golden) -> None:
    parts: Parts = {"conv": conv(2, 2), "norm": norm([2, 4])}
    fold(golden, net("self.norm(self.conv(x)) * self.conv.weight.sum()", **parts), X)


def test_statistics_that_are_read_elsewhere(golden: Golden) -> None:
    parts: Parts = {"conv": conv(2, 2), "norm": norm([2, 4], mean=[1, 2])}
    fold(golden, net("self.norm(self.conv(x)) * self.norm.running_mean.sum()", **parts), X)


def test_a_weight_that_is_computed(golden: Golden) -> None:
    layer = parametrizations.weight_norm(conv(2, 2))
    fold(golden, chain(layer, norm([2, 4])), X)


def test_a_weight_that_a_hook_computes(golden: Golden) -> None:
    with torch.no_grad():  # such a layer can be copied
        layer = prune.l1_unstructured(conv(2, 2), "weight", 0.5)
    fold(golden, chain(layer, norm([2, 4])), X)


def test_a_weight_that_cannot_become_another(golden: Golden) -> None:
    torch.manual_seed(0)
    layer = parametrizations.spectral_norm(conv(2, 2))
    fold(golden, chain(layer, norm([2, 4])), X)


def test_a_weight_that_the_forward_computes(golden: Golden) -> None:
    parts: Parts = {"conv": conv(2, 2), "norm": norm([2, 4])}
    call = "F.conv2d(x, self.conv.weight.abs())"
    fold(golden, net(f"self.norm({call})", **parts), X)


class _Features(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = norm([2, 4]), conv(2, 2)

    def features(self, x: Tensor) -> Any:
        return self.norm(x)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.features(x))


def test_a_method_that_gives_a_value(golden: Golden) -> None:
    fold(golden, _Features().double().eval(), X)


def test_a_function_that_can_get_no_bias(golden: Golden) -> None:
    weight = nn.Parameter(torch.tensor([[1.0, 2], [3, 4]]))
    bn = norm([2, 4], [1, -1], kind=nn.BatchNorm1d)
    fold(golden, net("self.norm(F.linear(x, self.w))", w=weight, norm=bn), ROWS)


def test_a_number_of_the_code(golden: Golden) -> None:
    fold(golden, net("self.norm(self.conv(x) + 3)", conv=conv(2, 2), norm=norm([2, 4])), X)


def test_one_number_for_several_channels(golden: Golden) -> None:
    parts: Parts = {
        "conv": conv(2, 2),
        "norm": norm([2, 4]),
        "k": nn.Parameter(torch.tensor(3.0)),
    }
    fold(golden, net("self.norm(self.conv(x) + self.k)", **parts), X)


def test_a_norm_without_a_module(golden: Golden) -> None:
    parts: Parts = {
        "conv": conv(2, 2),
        "mean": torch.tensor([1.0, 2]),
        "var": torch.tensor([4.0, 9]),
    }
    fold(golden, net("F.batch_norm(self.conv(x), self.mean, self.var)", **parts), X)


def test_a_norm_that_computes_more(golden: Golden) -> None:
    once = "F.batch_norm(x, self.running_mean, self.running_var)"
    parts: Parts = {
        "running_mean": torch.tensor([1.0, 2]),
        "running_var": torch.tensor([4.0, 9]),
    }
    bn = net(once, f"x = torch.relu({once})", **parts)
    fold(golden, chain(conv(2, 2), bn), X)


def test_statistics_that_no_norm_reads(golden: Golden) -> None:
    parts: Parts = {
        "running_mean": torch.tensor([1.0, 2]),
        "running_var": torch.tensor([4.0, 9]),
    }
    bn = net("x * self.running_var.sum() - self.running_mean.sum()", **parts)
    fold(golden, chain(conv(2, 2), bn), X)


def test_a_norm_that_is_written_out(golden: Golden) -> None:
    bn = net(
        "x * self.running_var.rsqrt()[:, None, None] - self.running_mean[:, None, None]",
        running_mean=torch.tensor([1.0, 2]),
        running_var=torch.tensor([4.0, 9]),
    )
    fold(golden, chain(conv(2, 2), bn), X)


def test_a_norm_whose_output_is_written_in_place(golden: Golden) -> None:
    parts: Parts = {
        "first": conv(2, 2),
        "a": conv(2, 2),
        "b": conv(2, 2),
        "norm": norm([2, 4]),
    }
    lines = ["x = self.first(x)", "y = self.a(torch.relu_(self.norm(x)))"]
    fold(golden, net("y + self.b(x)", *lines, **parts), X)


def test_a_group_norm_without_a_bias(golden: Golden) -> None:
    layer = numbered(nn.LayerNorm(2, bias=False))
    fold(golden, chain(layer, norm([2, 4], kind=nn.BatchNorm1d)), ROWS)


def test_what_lies_around_hooks(golden: Golden) -> None:
    layer, bn = conv(2, 2), norm([2, 4])
    layer.register_forward_hook(lambda *_: None)
    bn.register_forward_hook(lambda *_: None)
    fold(golden, chain(layer, norm([3, 5]), conv(2, 2), bn), X)


def test_parts_of_what_no_graph_holds(golden: Golden) -> None:
    lines = [
        "y = self.body(x).mean((2, 3))",
        "y = [self.head(row) for row in y if row.sum() > -1e9]",
    ]
    body = chain(conv(2, 2), norm([2, 4]))
    model = net("torch.stack(y)", *lines, body=body, head=linear(2, 2), unused=norm([1, 2]))
    fold(golden, model, X)


def test_one_weight_at_both_ends_of_a_norm(golden: Golden) -> None:
    parts: Parts = {"first": conv(2, 2), "conv": conv(2, 2), "norm": norm([2, 4])}
    result = "self.conv(torch.relu(self.norm(x))) + self.conv(x)"
    fold(golden, net(result, "x = self.first(x)", **parts), X)


def test_a_factor_of_the_code_lets_scales_pass(golden: Golden) -> None:
    fold(golden, net("self.norm(self.conv(x) * 3)", conv=conv(2, 2), norm=norm([2, 4])), X)


def test_a_part_of_which_code_outside_uses_a_layer(golden: Golden) -> None:
    lines = [
        "y = self.body(x).mean((2, 3)) * self.body[0].weight.sum()",
        "y = [self.head(row) for row in y if row.sum() > -1e9]",
    ]
    body = chain(conv(2, 2), norm([2, 4]))
    fold(golden, net("torch.stack(y)", *lines, body=body, head=linear(2, 2)), X)


def test_a_part_of_which_code_outside_uses_the_norm(golden: Golden) -> None:
    lines = [
        "y = self.body(self.body[1](x)).mean((2, 3))",
        "y = [self.head(row) for row in y if row.sum() > -1e9]",
    ]
    body = chain(conv(2, 2), norm([2, 4]))
    fold(golden, net("torch.stack(y)", *lines, body=body, head=linear(2, 2)), X)
