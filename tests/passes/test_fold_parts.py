"""Parts of folding that hardly show from outside: slabs, sharing, which sums may merge."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import bnfx
from bnfx.editing.sums import is_sum, operands_of
from bnfx.gauges import new_weights
from bnfx.graphs.examples import Example
from bnfx.graphs.inference import _runnable, inference_graph
from bnfx.passes import MergeBranches
from tests.support.laws import randomise

merging: Any = __import__(MergeBranches.__module__, fromlist=["_meet"])

# -- slabs -------------------------------------------------------------------------------------

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "dense": lambda: nn.Conv2d(12, 8, 3),
    "grouped": lambda: nn.Conv2d(12, 8, 3, groups=4),
    "depthwise": lambda: nn.Conv2d(12, 24, 3, groups=12, bias=False),
    "transposed": lambda: nn.ConvTranspose2d(12, 8, 1),
    "transposed, grouped": lambda: nn.ConvTranspose2d(12, 8, 1, groups=4),
    "transposed, depthwise": lambda: nn.ConvTranspose2d(12, 12, 1, groups=12, bias=False),
    "transposed, wide": lambda: nn.ConvTranspose2d(12, 8, 3, stride=2, groups=2),
}


class Between(nn.Module):
    """A layer with a BatchNorm before it and one behind it, both of which it takes up."""

    def __init__(self, layer: nn.Module, channels: int) -> None:
        super().__init__()
        self.before, self.layer, self.behind = nn.BatchNorm2d(12), layer, nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Any:
        return F.gelu(self.behind(self.layer(self.before(F.gelu(x)))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", LAYERS)
def test_slabs_do_not_show(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]()
    channels = int(getattr(layer, "out_channels"))  # noqa: B009  # of a convolution
    model = randomise(Between(layer, channels)).to(dtype)
    states = {}
    for slab in (2**30, 1, 20, 70, 200, 900):
        monkeypatch.setattr(new_weights, "_SLAB", slab)
        folded = bnfx.fold_bn(model)
        done = bnfx.report(folded).to_dict()["batch_norms"]
        wanted = ["kept" if name == "transposed, wide" else "folded", "folded"]
        assert [record["verdict"] for record in done] == wanted
        states[slab] = folded.state_dict()
    whole = states.pop(2**30)
    for slab, state in states.items():
        for key, value in whole.items():
            assert torch.equal(state[key], value), f"{key} with {slab} numbers at once"


@pytest.mark.parametrize("slab", [1, 20, 70, 200, 2**30])
@pytest.mark.parametrize("shape", [(8, 12, 3, 3), (1, 12, 3), (8, 1), (6, 0, 3, 3)])
def test_slabs_cover_a_weight_once(
    shape: tuple[int, ...], slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(new_weights, "_SLAB", slab)
    view = torch.zeros(4, *shape)
    for part in new_weights._slabs(view):
        view[part] += 1
        one_output = view[:1, :1].numel()
        assert view[part].numel() <= max(slab, one_output)
    assert bool((view == 1).all())


# -- sharing -----------------------------------------------------------------------------------


class Counting(nn.Module):
    """A forward that writes into one of its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("offset", torch.ones(1))

    def forward(self, x: Tensor) -> Any:
        self.get_buffer("count").add_(1)
        return self.layer(x) + self.get_buffer("count") + self.get_buffer("offset")


def shared_after_a_run(model: nn.Module) -> set[str]:
    """What a private copy to run has in common with the graph of `model`; a run changes nothing."""
    x = torch.randn(2, 3)
    traced = inference_graph(model, Example((x,), {})).module
    before = copy.deepcopy(traced.state_dict())
    private = _runnable(traced, traced)
    theirs = {tensor.data_ptr() for tensor in traced.state_dict().values()}
    names = {n for n, tensor in private.state_dict().items() if tensor.data_ptr() in theirs}
    private(x)
    after = traced.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert any(not torch.equal(v, before[n]) for n, v in private.state_dict().items())
    return names


def test_what_a_run_writes_is_copied_and_the_rest_is_shared() -> None:
    assert shared_after_a_run(Counting().eval()) == {"layer.weight", "layer.bias", "offset"}


def test_what_is_written_under_another_name_is_copied_too() -> None:
    model = Counting().eval()
    model.register_buffer("offset", model.get_buffer("count")[:])
    assert shared_after_a_run(model) == {"layer.weight", "layer.bias"}


def test_with_hooks_nothing_is_shared() -> None:
    model = Counting().eval()

    def spoil(module: nn.Module, *_: object) -> None:
        module.get_parameter("weight").data.zero_()

    model.layer.register_forward_hook(spoil)
    assert shared_after_a_run(model) == set()


# -- sums that may merge -----------------------------------------------------------------------


class Parts(nn.Module):
    """Layers for the sums below."""

    def __init__(self, body: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.body = body
        self.a, self.b, self.k = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Parameter(torch.ones(4))
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


SUMS: dict[str, tuple[Callable[[Any, Tensor], Any], bool]] = {
    "two convolutions": (lambda m, x: m.a(x) + m.b(x), True),
    "one convolution and its input": (lambda m, x: m.a(x) + x, True),
    "scaled": (lambda m, x: m.a(x) * 2.0 + x * m.k.view(-1, 1, 1), True),
    "behind a norm": (lambda m, x: m.norm(m.a(x)) + x, True),
    "behind a dropout": (lambda m, x: F.dropout(m.a(x), 0.5, training=False) + x, True),
    "in a sum of three": (lambda m, x: m.a(F.relu(x)) + m.b(F.gelu(x)) + F.relu(x), False),
    "of other tensors": (lambda m, x: m.a(F.relu(x)) + m.b(F.gelu(x)), False),
    "behind nonlinearities": (lambda m, x: F.relu(m.a(x)) + F.gelu(m.b(x)), False),
    "with a constant": (lambda m, x: m.a(x) + m.k.view(-1, 1, 1), False),
    "with a number": (lambda m, x: m.a(x) + 1.0, False),
}


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_is_looked_into_only_where_branches_meet(name: str) -> None:
    body, meets = SUMS[name]
    graph = inference_graph(Parts(body).eval(), None).module.graph
    root = [node for node in graph.nodes if is_sum(node)][-1]
    assert merging._meet(list(operands_of(root))) is meets


def test_the_same_operand_twice_meets_itself() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert merging._meet([x, x])
    assert not merging._meet([x, 1.0])
    assert not merging._meet([])


# -- what nothing reads ------------------------------------------------------------------------


class Frozen(nn.Module):
    """A BatchNorm written as arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.running_mean = nn.Buffer(torch.randn(4))
        self.running_var = nn.Buffer(torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.running_var + 1e-5).rsqrt().view(-1, 1, 1)
        return x * scale - self.running_mean.view(-1, 1, 1) * scale


class Unread(nn.Module):
    """A convolution whose output goes on through a BatchNorm, and into branches without an end."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.alone, self.before, self.norm = (nn.BatchNorm2d(4) for _ in range(3))
        self.frozen = Frozen()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        self.alone(y)
        torch.relu_(self.before(y)).mean()
        self.frozen(y)
        return self.norm(y)  # type: ignore[no-any-return]  # modules return Any


def test_what_nothing_reads_ties_nothing() -> None:
    model = randomise(Unread()).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for example in (None, x):
        folded = bnfx.fold_bn(model, example)
        torch.testing.assert_close(folded(x), model(x), rtol=1e-10, atol=1e-12)
        records = bnfx.report(folded).to_dict()["batch_norms"]
        told = {r["path"]: (r["verdict"], r["into"], r["reason"]) for r in records}
        gone: Any = ("folded", [], "nothing reads its output")
        assert told == {
            "alone": gone,
            "before": gone,
            "frozen": gone,
            "norm": ("folded", ["conv"], ""),
        }


def test_what_writes_or_draws_stays_though_nothing_reads_it() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.seen = nn.BatchNorm1d(4), nn.Buffer(torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.add_(self.norm(x).mean(0))
            torch.rand_like(x)
            return x + 1

    model, x = randomise(Net()).double(), torch.randn(2, 4, dtype=torch.float64)
    folded = bnfx.fold_bn(model)
    ends = []
    for net in (model, folded):
        torch.manual_seed(0)
        net(x)
        ends.append((net.get_buffer("seen").clone(), torch.rand(1)))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-12, atol=1e-12)
