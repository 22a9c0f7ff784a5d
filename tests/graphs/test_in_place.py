"""What shares memory and what is written, for every function of torch; in-place calls in graphs."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import bnfx
from bnfx.graphs.in_place import aliases, barred, freshen, restore
from bnfx.operators.calls import words
from bnfx.operators.effects import name_inplace_flag, writes
from tests.support.networks import conv, net, norm

_SHAPE = (2, 3, 4, 4)
#: What is given behind the input; what a function does not take, it refuses.
_ARGUMENTS: tuple[tuple[Any, ...], ...] = (
    (),
    (1,),
    (0, 1),
    _SHAPE,
    (torch.float32,),
    (1.0, True),
    (0.1, 0.3, False, True),
    (torch.ones(_SHAPE),),
)
#: They change what a tensor is or the state of torch itself, or take long.
_LEFT_OUT = tuple(
    words(
        "_ set_ use_ resize share_memory compile seed manual fork wait init save load module "
        "import parse merge unify autocast clear lobpcg broadcast_shapes"
    )
)


def calls() -> Iterator[tuple[Any, str, tuple[Any, ...], dict[str, Any]]]:
    """Functions and methods with arguments behind the input."""
    for space in (torch, F, operator, Tensor):
        for name in sorted(dir(space)):
            target = getattr(space, name, None)
            if name.startswith(_LEFT_OUT) or not callable(target):
                continue
            if not isinstance(target, type):
                modes = [{}, {"training": False}] if "dropout" in name else [{}]
                for args in _ARGUMENTS:
                    for kwargs in modes:
                        yield target, name if space is Tensor else "", args, kwargs


def node_of(target: Any, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
    graph = fx.Graph()
    x = graph.placeholder("x")
    if method:
        node = graph.call_method(method, (x, *args), kwargs)
    else:
        node = graph.call_function(target, (x, *args), kwargs)
    graph.output(node)
    name_inplace_flag(node)
    return node


def shares(x: Tensor, result: object) -> bool:
    leaves = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor) and t.numel()]
    own = x.untyped_storage().data_ptr()
    return any(
        t.layout is torch.strided and not t.is_meta and t.untyped_storage().data_ptr() == own
        for t in leaves
    )


def test_whatever_may_be_a_view_or_a_write_is_known_as_one() -> None:
    data, seen, wrong = torch.rand(_SHAPE), 0, []
    for target, method, args, kwargs in calls():
        x = data.clone()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                result = target(x, *args, **kwargs)
            except Exception:  # noqa: BLE001  # it does not take these arguments
                continue
        viewed, written = shares(x, result), not torch.equal(x, data)
        if not viewed and not written:
            continue
        seen += 1
        node = node_of(target, method, args, kwargs)
        groups = aliases(node.graph).groups
        together = groups[node] is groups[node.all_input_nodes[0]]
        if (viewed and not together) or (written and not writes(node)):
            wrong.append(f"{method or target}{args}{kwargs}")
    assert not wrong
    assert seen > 300


@pytest.mark.parametrize("line", [
    "z = F.relu(y, True)",
    "z = F.hardtanh(y, -1.0, 1.0, True)",
    "z = y.relu_()",
    "z = y.add_(1)",
    "z = y.mul_(2)",
    "z = torch.relu_(y)",
])  # fmt: skip
def test_a_call_that_nobody_watches_becomes_fresh_and_back(line: str) -> None:
    graph = fx.Tracer().trace(net("z.sin()", "y = torch.cos(x)", line))
    for node in graph.nodes:
        name_inplace_flag(node)
    before = [(node.op, node.target, node.args, node.kwargs) for node in graph.nodes]
    assert not barred(graph)
    old = freshen(graph, barred(graph))
    assert len(old) == 1
    assert not any(writes(node) for node in graph.nodes)
    restore(graph, old)
    assert [(node.op, node.target, node.args, node.kwargs) for node in graph.nodes] == before


@pytest.mark.parametrize(("lines", "result"), [
    (["y = self.conv(x)", "v = y.flatten(1)", "y.add_(1)"], "self.bn(y), v"),
    (["y = self.conv(x)", "v = y[:, :1]", "y.mul_(2)"], "self.bn(y), v"),
    (["y = self.conv(x)", "v = y.detach()", "F.relu(y, True)"], "self.bn(y), v"),
    (["y = self.conv(x)", "v = F.dropout(y, 0.5, False)", "y.add_(1)"], "self.bn(v), y"),
    (["y = self.conv(x)", "y[:, 0] = 1"], "self.bn(y)"),
    (["y = self.conv(x)", "v = y.view(-1)", "v += 1"], "self.bn(y)"),
    (["y = self.conv(x)", "y += y.mean()"], "self.bn(y)"),
    (["y = x.clone()", "v = y.transpose(1, 2)", "v.sub_(1)"], "self.bn(self.conv(y)), v"),
])  # fmt: skip
@pytest.mark.parametrize("given", [False, True])
def test_what_is_written_while_others_read_it_keeps_its_values(
    lines: list[str],
    result: str,
    given: bool,  # noqa: FBT001  # drawn by pytest
) -> None:
    model = net(result, *lines, conv=conv(2, 2), bn=norm([2, 4], [1, -1]))
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    if "] =" in lines[-1] and not given:
        pytest.skip("symbolic tracing takes no assignment to items")
    folded = bnfx.fold_bn(model, x.clone() if given else None)
    truth, ours = model(x.clone()), folded(x.clone())
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)


def test_an_input_that_the_model_writes_to_is_written_to() -> None:
    model = net("self.bn(self.conv(x.add_(1)))", conv=conv(2, 2), bn=norm([2, 4]))
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    ours, theirs = x.clone(), x.clone()
    torch.testing.assert_close(bnfx.fold_bn(model)(ours), model(theirs), rtol=1e-10, atol=1e-10)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, x)


@pytest.mark.parametrize("view", ["T", "mT", "H", "mH", "data", "real"])
@pytest.mark.parametrize("given", ["example", None])
def test_what_is_written_through_an_attribute_is_written(view: str, given: str | None) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = getattr(x, view)
            y += 1
            return y

    x = torch.randn(4, 6)
    folded = bnfx.fold_bn(Net().eval(), None if given is None else (x.clone(),))
    theirs, ours = x.clone(), x.clone()
    assert torch.equal(Net()(theirs), folded(ours))
    assert torch.equal(theirs, ours)


@pytest.mark.parametrize("form", ["graph", "module"])
@pytest.mark.parametrize("given", ["example", None])
def test_insertion_takes_augmented_assignment_for_writing(
    form: Literal["graph", "module"], given: str | None
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            one = self.first(x)
            other = one
            other += 1
            return torch.relu(self.last(torch.relu(one)))

    net, x = Net().eval(), torch.randn(5, 3)
    inserted = bnfx.insert_bn(net, None if given is None else (x,), include="none", form=form)
    assert torch.equal(inserted(x), net(x))
