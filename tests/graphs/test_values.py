"""What is known of a graph before it runs: shapes, constants, names; held against running it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from bnfx.errors import CaptureError
from bnfx.graphs.constants import Values
from bnfx.graphs.examples import Example
from bnfx.graphs.inference import inference_graph
from bnfx.graphs.naming import channels, owner_of
from bnfx.graphs.parameters import attribute, constants, free_name, set_tensor
from bnfx.graphs.shapes import UNKNOWN, is_tensor, shapes_of
from bnfx.operators.table import reads_elements
from tests.support.graph_moves import MOVES
from tests.support.graphs import random_network
from tests.support.networks import chain, conv, linear, net, norm


class Recorded(fx.Interpreter):
    """Runs a graph and keeps every value."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]


def captured(seed: int, *, given: bool) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """A random network as a graph; from the exporter where tracing refuses it."""
    sample = random_network(random.Random(seed), MOVES)
    inputs = sample.inputs()
    try:
        module = inference_graph(sample.build(), Example(inputs, {}) if given else None).module
    except CaptureError:
        module = inference_graph(sample.build(), Example(inputs, {})).module
    return module, inputs


def values_of(module: fx.GraphModule, inputs: Sequence[Any]) -> dict[fx.Node, Any]:
    recorded = Recorded(module)
    with torch.no_grad():
        recorded.run(*(x.clone() for x in inputs))
    return recorded.values


@pytest.mark.parametrize("seed", range(20))
def test_shapes_are_those_of_a_run(seed: int) -> None:
    module, inputs = captured(seed, given=True)
    shapes, truth = shapes_of(module, inputs)[0], values_of(module, inputs)
    assert not shapes.assumed
    for node, value in truth.items():
        fake = shapes.values.get(node, UNKNOWN)
        if isinstance(value, Tensor) and is_tensor(fake):
            assert (fake.shape, fake.dtype) == (value.shape, value.dtype), node


@pytest.mark.parametrize("seed", range(20))
def test_a_constant_has_its_value_whatever_the_inputs_are(seed: int) -> None:
    module, inputs = captured(seed, given=False)
    values = Values(module.graph, constants(module))
    runs = [values_of(module, inputs), values_of(module, [x + 1 for x in inputs])]
    for node in module.graph.nodes:
        if not values.is_constant(node) or not isinstance(runs[0][node], Tensor):
            continue
        known = values.of(node)
        assert known is not None
        assert all(torch.equal(known, run[node]) for run in runs)
        assert values.sources(node)


@pytest.mark.parametrize("seed", range(20))
def test_what_reads_no_elements_does_not_see_them(seed: int) -> None:
    module, inputs = captured(seed, given=False)
    first, second = (values_of(module, each) for each in (inputs, [x * 3 + 1 for x in inputs]))
    for node in module.graph.nodes:
        if node.op == "output" or any(reads_elements(node, n) for n in node.all_input_nodes):
            continue
        if node.all_input_nodes and isinstance(first[node], int | torch.Size):
            assert first[node] == second[node]


@pytest.mark.parametrize("layers", [
    (conv(2, 3, 3), nn.ReLU(), norm([1, 2, 3])),
    (nn.ReLU(), norm([1, 2]), conv(2, 3, 3, padding=1)),
    (conv(2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear(3, 2)),
])  # fmt: skip
def test_assumed_shapes_hold_at_other_sizes(layers: tuple[nn.Module, ...]) -> None:
    module = inference_graph(chain(*layers), None).module
    first, second = shapes_of(module, None)
    assert first.assumed
    assert not first.failures
    for node in module.graph.nodes:
        fakes = [run.values.get(node) for run in (first, second)]
        if is_tensor(fakes[0]) and is_tensor(fakes[1]):
            assert fakes[0].dim() == fakes[1].dim()
    truth = values_of(module, [torch.randn(3, 2, 9, 7, dtype=torch.float64)])
    ranks = {n: v.dim() for n, v in first.values.items() if is_tensor(v) and n in truth}
    assert ranks == {n: truth[n].dim() for n in ranks}


@pytest.mark.parametrize("line", [
    "y = F.dropout(self.w, 0.5, True)",
    "y = torch.empty_like(self.w)",
    "y = self.w + x.sum()",
    "y = torch.bernoulli(self.w)",
])  # fmt: skip
def test_what_differs_from_run_to_run_is_no_constant(line: str) -> None:
    module = inference_graph(net("x + y", line, w=torch.ones(2)), None).module
    values = Values(module.graph, constants(module))
    total = next(node for node in reversed(module.graph.nodes) if node.op == "call_function")
    assert values.of(total.args[1]) is None


def test_a_buffer_that_the_forward_writes_is_no_constant() -> None:
    model = net("x + self.a + self.b", "self.a.add_(1)", a=torch.ones(2), b=torch.ones(2))
    module = inference_graph(model, None).module
    known = constants(module)
    assert known.written == {"a"}
    assert set(known.tensors) == {"a", "b"}


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(0, 40)))
def test_channels_read_as_ranges(which: set[int]) -> None:
    text = channels(np.array(sorted(which), np.int64))
    if not which:
        assert text == "no channels"
        return
    assert text.startswith("channels " if len(which) > 1 else "channel ")
    told, _, more = text.partition(" and ")
    named: set[int] = set()
    for part in told.partition(" ")[2].split(", "):
        low, _, high = part.partition("-")
        named |= set(range(int(low), int(high or low) + 1))
    assert named <= which
    assert bool(more) == (named != which)


def test_names_that_are_free() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert free_name(model, "0.bias") == "0.bias_1"
    assert free_name(model, "0.merged.weight") == "0.merged.weight"
    assert free_name(model, "forward") == "forward_1"
    model[0].register_buffer("bias_1", torch.zeros(1))
    assert free_name(model, "0.bias") == "0.bias_2"
    assert free_name(model, "0.weight.inner") == "0.weight_1.inner"


@pytest.mark.parametrize("buffer", [False, True])
def test_a_tensor_takes_the_place_of_whatever_was_there(*, buffer: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 2)).eval()
    model.register_buffer("old", torch.zeros(1))
    for name in ("0.weight", "old", "new.deep.weight"):
        set_tensor(model, name, torch.ones(3), trained=False, buffer=buffer)
        assert isinstance(attribute(model, name), Tensor)
        assert torch.equal(model.state_dict()[name], torch.ones(3))
        assert isinstance(attribute(model, name), nn.Parameter) is not buffer
    assert not any(module.training for module in model.modules())


def test_owners() -> None:
    assert owner_of("a.b.weight") == "a.b"
    assert owner_of("weight") == "weight"
