"""What bnfx returns is the same function after copying, pickling and saving."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnfx

WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "again": lambda model: copy.deepcopy(pickle.loads(pickle.dumps(copy.deepcopy(model)))),
}


def doubled(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
    return out * 2


def lowered(_module: nn.Module, _args: Any, _kwargs: Any, out: Tensor) -> Tensor:
    return out - 1


def raised(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] + 1,)


def tripled(_module: nn.Module, args: tuple[Tensor], kwargs: Any) -> tuple[tuple[Tensor], Any]:
    return (args[0] * 3,), kwargs


def saved(model: nn.Module) -> nn.Module:
    held = io.BytesIO()
    torch.save(model, held)
    held.seek(0)
    loaded: nn.Module = torch.load(held, weights_only=False)
    return loaded


def hooked(model: nn.Module) -> nn.Module:
    model.register_forward_pre_hook(raised)
    model.register_forward_pre_hook(tripled, with_kwargs=True)
    model.register_forward_hook(doubled)
    model.register_forward_hook(lowered, with_kwargs=True, always_call=True)
    return model


def plain() -> nn.Module:
    norm = nn.BatchNorm1d(4)
    norm.get_buffer("running_mean").normal_()
    model = nn.Sequential(nn.Conv1d(3, 4, 1), norm, nn.Conv1d(4, 4, 1), nn.ReLU())
    return model.double().eval()


@pytest.mark.parametrize("way", [*WAYS.values(), saved], ids=[*WAYS, "save"])
@pytest.mark.parametrize("given", [True, False])
def test_hooks_of_the_root_stay(way: Callable[[nn.Module], nn.Module], given: bool) -> None:  # noqa: FBT001  # drawn by pytest
    model, x = hooked(plain()), torch.randn(2, 3, 5, dtype=torch.float64)
    example = (x,) if given else None
    for made in (
        bnfx.fold_bn(model, example),
        bnfx.insert_bn(model, example, init="identity").eval(),
    ):
        again = way(made)
        torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=1e-5)
        assert torch.equal(again(x), made(x))
        assert bnfx.report(again).to_dict() == bnfx.report(made).to_dict()
        assert list(again.state_dict()) == list(made.state_dict())


def test_hooks_of_a_graph_that_is_given_stay() -> None:
    graph = hooked(torch.fx.symbolic_trace(plain()))
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    folded = copy.deepcopy(bnfx.fold_bn(graph))
    torch.testing.assert_close(folded(x), graph(x), rtol=1e-10, atol=1e-10)


def test_backward_hooks_stay() -> None:
    seen: list[str] = []
    model = nn.Sequential(nn.Sequential(nn.Conv1d(3, 4, 1), nn.ReLU()), nn.Conv1d(4, 2, 1))
    model.register_full_backward_hook(lambda *_: seen.append("root"))
    model[0].register_full_backward_pre_hook(lambda *_: seen.append("inner"))
    made = copy.deepcopy(bnfx.insert_bn(model))
    made(torch.randn(2, 3, 5, requires_grad=True)).sum().backward()
    assert sorted(seen) == ["inner", "root"]


class Computed(nn.Module):
    """Methods and functions of buffers with computed sizes, and operators that write in place."""

    table: Tensor
    places: Tensor
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4)
        self.bn.get_buffer("running_mean").normal_()
        self.register_buffer("table", torch.randn(1, 4, 1))
        self.register_buffer("places", torch.arange(64))
        self.plain = torch.randn(4, 1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x)) * self.table.expand(x.shape[0], -1, -1)
        y = y + self.places[: x.shape[2]] + self.table.new_zeros(x.shape[0], 1, 1)
        y = y + self.plain.repeat(1, x.shape[2]) + torch.narrow(self.places, 0, 0, x.size(2))
        seen = y.view(y.size(0), -1)
        y += 1
        y *= self.plain
        self.calls.add_(1)
        out: Tensor = y + seen.sum()
        return out


@pytest.mark.parametrize("way", [*WAYS.values(), saved], ids=[*WAYS, "save"])
def test_a_pickle_reads_every_tensor_when_it_runs(way: Callable[[nn.Module], nn.Module]) -> None:
    model, x = Computed().double().eval(), torch.randn(2, 3, 6, dtype=torch.float64)
    model.plain = model.plain.double()
    for example in ((x,), None):
        folded = bnfx.fold_bn(model, example)
        calls = float(folded.get_buffer("calls"))
        again = way(folded)
        assert again.get_buffer("calls") == calls, "reading must not run what writes"
        for size in (x, torch.randn(3, 3, 4, dtype=torch.float64)):
            torch.testing.assert_close(again(size), model(size), rtol=1e-10, atol=1e-10)
        again.get_buffer("table").zero_()
        if way is not copy.copy:
            assert folded.get_buffer("table").any(), "a copy has tensors of its own"


class Remembers(nn.Module):
    """Keeps what it computed, in containers (the biases of LeViT's attention)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4)
        self.seen: dict[str, list[Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.conv(x))
        self.seen["last"] = [out.sum()]
        return out


def test_a_model_that_keeps_what_it_computed_can_be_folded() -> None:
    model, x = Remembers().eval(), torch.randn(2, 3, 5)
    expected = model(x)
    for example in ((x,), None):
        torch.testing.assert_close(bnfx.fold_bn(model, example)(x), expected)
    assert model.seen["last"][0].requires_grad, "the source has what it had"
