"""Laws of insertion: eval outputs stay, copies and pickles are the same, old checkpoints load."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import bnfx


class Net(nn.Module):
    """Named parts and a forward over them."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self._forward = forward

    def forward(self, x: Tensor) -> Any:
        return self._forward(self, x)


class Drop(nn.Module):
    """Reads its mode in its own forward."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


class Depth(nn.Module):
    """Stochastic depth: train mode does more than eval mode."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        if self.training:
            out = out * torch.empty(len(x), 1, 1, 1).bernoulli_(0.5)
        return x + out


def conv(inputs: int = 4, outputs: int = 4) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def cropped(m: Any, x: Tensor) -> Tensor:
    y = torch.relu(m.conv(x))[:, :, : x.shape[2], 1 : x.shape[3] - 1]
    return m.out(F.dropout(y, 0.1, m.training))  # type: ignore[no-any-return]  # a layer


def data_dependent(m: Any, x: Tensor) -> Tensor:
    if x.mean() > 100:
        return x
    return m.out(torch.relu(m.conv(x)))  # type: ignore[no-any-return]  # a layer


class TwoNames(nn.Module):
    """One block in two slots, and one layer in two slots of one module."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(conv(), nn.ReLU())
        self.b = self.a
        self.near = conv()
        self.far = self.near
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(torch.relu(self.far(self.b(x))))
        return out


def hooked() -> nn.Module:
    net = nn.Sequential(conv(), nn.ReLU(), conv(), nn.ReLU(), conv(4, 2))
    net[0].register_forward_hook(_doubled)
    net[2].register_forward_pre_hook(_shifted)
    return net


def _doubled(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
    return out * 2


def _shifted(_module: nn.Module, args: Any) -> Any:
    return (args[0] + 1,)


def hooked_root() -> nn.Module:
    net = nn.Sequential(conv(), nn.ReLU(), conv(4, 2))
    net.register_forward_hook(_doubled)
    return net


MODELS: dict[str, Callable[[], nn.Module]] = {
    "a function that reads its mode": lambda: nn.Sequential(conv(), nn.ReLU(), Drop(), conv(4, 2)),
    "stochastic depth": lambda: nn.Sequential(
        Depth(nn.Sequential(conv(), nn.ReLU(), conv())), nn.ReLU(), conv(4, 2)
    ),
    "slices with computed bounds": lambda: Net(cropped, conv=conv(), out=conv(4, 2)),
    "a root that cannot be traced": lambda: Net(data_dependent, conv=conv(), out=conv(4, 2)),
    "two names": TwoNames,
    "hooks": hooked,
    "a hook on the root": hooked_root,
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_insertion(name: str, given: bool) -> None:  # noqa: FBT001  # drawn by pytest
    model, x = build(name).eval(), torch.randn(4, 4, 6, 6)
    before, truth = state(model), model(x)
    done = bnfx.insert_bn(model, x if given else None, init="identity")
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    torch.testing.assert_close(done(x), truth, rtol=1e-4, atol=1e-5)
    inserted = sum(isinstance(m, nn.BatchNorm2d) for m in done.modules())
    assert inserted or (not given and name == "a root that cannot be traced")
    pickled = pickle.loads(pickle.dumps(done))
    saved = io.BytesIO()
    torch.save(done.state_dict(), saved)
    for twin in (done, copy.deepcopy(done), pickled):
        assert list(twin.state_dict()) == list(done.state_dict())
        assert [m.training for m in twin.modules()] == [m.training for m in done.modules()]
        torch.testing.assert_close(twin(x), truth, rtol=1e-4, atol=1e-5)
        twin.load_state_dict(before, strict=True)  # of the time before
        torch.testing.assert_close(twin(x), truth, rtol=1e-4, atol=1e-5)
        saved.seek(0)
        twin.load_state_dict(torch.load(saved), strict=True)
    assert set(before) - set(done.state_dict()) <= {key for key in before if "bias" in key}


@pytest.mark.parametrize("name", ["a function that reads its mode", "stochastic depth"])
def test_each_part_has_the_mode_of_the_source(name: str) -> None:
    """At once, and from then on: a part that is put into eval mode alone stays there."""
    model, x = build(name).train(), torch.randn(4, 4, 6, 6)
    frozen = "2" if name.startswith("a function") else "0"
    model.get_submodule(frozen).eval()
    done = bnfx.insert_bn(model)
    theirs = {path: m.training for path, m in model.named_modules()}
    assert {p: m.training for p, m in done.named_modules() if p in theirs}.items() <= theirs.items()
    norms = [m.eval() for m in done.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert torch.equal(done(x), done(x))  # nothing is drawn
    done.train()
    assert not torch.equal(done(x), done(x))


def test_a_batch_of_one_value_names_the_layer() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    done = bnfx.insert_bn(net, form="graph").train()
    with pytest.raises(ValueError, match="more than 1 value per channel") as raised:
        done(torch.randn(1, 3, 1, 1))
    [note] = raised.value.__notes__
    assert "'0'" in note
    assert "'0_bn'" in note


def test_twice_behind_the_nonlinearity_adds_nothing() -> None:
    model, x = nn.Sequential(conv(), nn.ReLU(), conv(4, 2)), torch.randn(4, 4, 6, 6)
    once = bnfx.insert_bn(model, x, placement="post_activation")
    twice = bnfx.insert_bn(once, x, placement="post_activation")
    assert sum(isinstance(m, nn.BatchNorm2d) for m in twice.modules()) == 1


class Detector(nn.Module):
    """Keeps the rows that pass a threshold, and other ones in float64."""

    def __init__(self, takes: int | None) -> None:
        super().__init__()
        self.body, self.takes = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), takes

    def forward(self, x: Tensor) -> Any:
        y = self.body(x)
        kept = y[: 4 if y.dtype is torch.float32 else 2]
        return kept if self.takes is None else (kept, kept[self.takes])


@pytest.mark.parametrize("takes", [None, 1, 3])
def test_outputs_of_data_dependent_length(takes: int | None) -> None:
    model, x = Detector(takes).eval(), torch.randn(8, 4)
    done = bnfx.insert_bn(model, x, init="identity")
    assert any(isinstance(m, nn.BatchNorm1d) for m in done.modules())
    torch.testing.assert_close(done(x), model(x))


class Tries(nn.Module):
    """Calls a layer in the way of another library first."""

    def __init__(self) -> None:
        super().__init__()
        self.near, self.out = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        try:
            y = self.near(x, lengths=None)
        except TypeError:
            y = self.near(x)
        out: Tensor = self.out(torch.relu(y))
        return out


def wrapped() -> nn.Module:
    body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    return nn.Sequential(checkpoint_wrapper(body), nn.ReLU(), nn.Linear(4, 2))


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("build", [Tries, wrapped])
def test_other_libraries_ways(build: Callable[[], nn.Module], given: bool) -> None:  # noqa: FBT001  # drawn by pytest
    model, x = build().eval(), torch.randn(5, 4)
    done = bnfx.insert_bn(model, x if given else None, init="identity")
    assert any(isinstance(m, nn.BatchNorm1d) for m in done.modules())
    torch.testing.assert_close(done(x), model(x))
    before = {key for key in model.state_dict() if "bias" not in key}
    assert before <= set(done.state_dict())
    done.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(done(x), model(x))
    assert_it_trains(done, x)


def assert_it_trains(model: nn.Module, x: Tensor) -> None:
    model.train()(x).sum().backward()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d)]
    assert all(norm.weight.grad is not None for norm in norms)


def test_what_cannot_be_copied_is_told_in_a_sentence() -> None:
    class Sharded(nn.Module):
        def __deepcopy__(self, memo: object) -> nn.Module:
            raise AssertionError("no copies of shards")

    with pytest.raises(bnfx.CaptureError, match=r"no copies of shards.*shard and wrap what bnfx"):
        bnfx.insert_bn(Sharded())
