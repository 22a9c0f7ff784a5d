"""Capture: tracing leaves whole what it cannot follow, and the exporter is asked for open sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, fx, nn

import bnfx
from bnfx.graphs.tracing import Tracer, trace
from bnfx.reports.report import FoldReport
from tests.support.laws import count_batch_norms, randomise


class Same(nn.Module):
    """A forward that a trace cannot follow where `twice` is false."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(4, 4, 1)
        self.k = nn.Parameter(torch.rand(4, 1, 1) + 0.5)

    def forward(self, x: Tensor, *, twice: bool = False) -> Tensor:
        """(N, 4, H, W) -> the same."""
        x = self.inner(x) * self.k
        if twice:
            return x * 2
        return x * 2 if x.detach().sum() > 1e9 else x


class Nest(nn.Module):
    """Untraceable modules at several depths, and one that is read outside of them too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Sequential(nn.ReLU(), Same()), Same()
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 4, H, W) -> the same."""
        x = self.first(x) + self.second(x, twice=True)
        out: Tensor = self.bn(self.second(x)) * self.second.k
        return out


def test_what_cannot_be_traced_stays_whole_wherever_it_is_called() -> None:
    model = randomise(Nest()).eval()
    graph, opaque = trace(Tracer, model, frozenset(), None)
    assert opaque == {"first.1", "second"}
    calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    assert calls == ["first.0", "first.1", "second", "second", "bn"]
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(fx.GraphModule(model, graph)(x), model(x))


def test_one_failure_costs_no_further_pass() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.ReLU(), Same()) for _ in range(6))).eval()
    with mock.patch.object(Tracer, "trace", autospec=True, side_effect=Tracer.trace) as passes:
        _, opaque = trace(Tracer, model, frozenset(), None)
    assert len(opaque) == 6
    assert passes.call_count == 1


def test_a_fold_around_it_is_right() -> None:
    model = randomise(Nest()).eval().double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(bnfx.fold_bn(model)(x), model(x), rtol=1e-12, atol=1e-12)


class Odd(nn.Module):
    """Pads odd images: torch.export cannot leave the sizes of images open here, only the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.conv, self.bn = nn.Conv2d(4, 4, 2, stride=2), nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 4, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 4, H, W) -> (N, 4, H / 2, W / 2)."""
        x = self.stem(x)
        height, width = x.shape[-2:]
        below, beside = (-height) % 2, (-width) % 2
        if below or beside:
            x = nn.functional.pad(x, (0, beside, 0, below))
        out: Tensor = self.up(self.bn(self.conv(x)))[..., :height, :width]
        return out


def test_where_the_exporter_must_fix_sizes_the_batch_stays_open() -> None:
    model, x = randomise(Odd()).eval(), torch.randn(1, 4, 16, 16)
    folded = bnfx.fold_bn(model, x)
    assert vars(x) == {}  # a failed attempt leaves no mark on the example
    assert count_batch_norms(folded) == 0
    other = torch.randn(3, 4, 16, 16)
    torch.testing.assert_close(folded(other), model(other))


class Fork(nn.Module):
    """A forward that depends on values: nothing captures it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 4, H, W) -> the same."""
        y: Tensor = self.bn(self.conv(x))
        return y if y.detach().sum() > 0 else -y


def test_the_reason_says_what_was_tried_on_a_module_that_stays_whole() -> None:
    model = nn.Sequential(Fork(), nn.ReLU()).eval()
    assert "pass example_inputs" in bnfx.plan_fold(model).batch_norms[0].reason
    given = bnfx.plan_fold(model, torch.randn(1, 4, 5, 5)).batch_norms[0].reason
    assert "nor does the exporter take the model (torch.export: Could not guard" in given
    hooked = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))).eval()
    hooked[0].register_forward_hook(lambda *_: None)
    assert "remove them first" in bnfx.plan_fold(hooked).batch_norms[0].reason


class Noisy(nn.Module):
    """Adds noise whose size no argument decides: a trace would hold one draw of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 4, H - 2, W - 2)."""
        out: Tensor = self.bn(self.conv(x)) + torch.rand(4, 1, 1)
        return out


def test_random_numbers_are_never_taken_for_constants() -> None:
    noisy = Noisy()
    inside = randomise(nn.Sequential(noisy, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))).eval()
    x, state = torch.randn(2, 3, 6, 6), torch.get_rng_state()
    with pytest.raises(bnfx.CaptureError, match="random numbers"):
        bnfx.fold_bn(noisy)
    whole, exported = bnfx.fold_bn(inside), bnfx.fold_bn(inside, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert [r["verdict"] for r in bnfx.report(whole).to_dict()["batch_norms"]] == ["kept", "folded"]
    assert [r["verdict"] for r in bnfx.report(exported).to_dict()["batch_norms"]] == ["folded"] * 2
    drawn = []
    for net in (inside, whole, exported):
        torch.manual_seed(0)
        drawn.append(net(x))
        assert not torch.allclose(net(x), drawn[-1], atol=1e-3)
    torch.testing.assert_close(drawn[1:], [drawn[0]] * 2)


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb"])
def test_a_name_that_is_no_string_in_code_is_refused(name: str) -> None:
    model = nn.Sequential()
    model.add_module(name, nn.Conv2d(3, 4, 1))
    model.add_module("bn", nn.BatchNorm2d(4))
    with pytest.raises(bnfx.CaptureError, match="rename"):
        bnfx.fold_bn(model.eval())


def test_names_are_no_markup_in_a_report() -> None:
    model = nn.Sequential()
    model.add_module("<script>alert(1)<|script>&'x", nn.Conv2d(3, 4, 1))
    model.add_module("<b>bn", nn.BatchNorm2d(4))
    page = bnfx.report(bnfx.fold_bn(model.eval())).to_html()
    assert "<script>alert" not in page
    assert "<b>bn" not in page
    assert "&lt;b&gt;bn" in page


class Asking(nn.Module):
    """A forward that asks what its values are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4)
        self.out = nn.Conv1d(4, 4, 1)

    def forward(self, x: Any) -> Tensor:
        y: Any = self.norm(self.conv(x))
        y = y * 2 if isinstance(y, Tensor) else y
        y = y + 1 if not torch.is_tensor(y.cumsum(1)) else y
        y = y + 3 if torch.jit.isinstance(x, Tensor) else y
        y = y + 5 if isinstance(x, list | tuple) or isinstance(x.shape, Tensor) else y
        y = y + 7 if isinstance(y.chunk(2, 1), Tensor) else y
        y = y + 9 if isinstance(y.chunk(2, 1)[0] + y[:, :2], Tensor) else y
        y = y + 11 if isinstance(y.max(1), Tensor) or isinstance(x.size(0), Tensor) else y
        out: Tensor = self.out(torch.relu(y))
        return out


def test_values_say_what_they_are() -> None:
    """Without an example nothing would tell that the graph holds another branch."""
    model, x = Asking().double().eval(), torch.randn(2, 3, 5, dtype=torch.float64)
    for made in (
        bnfx.fold_bn(model),
        bnfx.insert_bn(model, init="identity", form="graph"),
        bnfx.insert_bn(model, init="identity"),
    ):
        torch.testing.assert_close(made.eval()(x), model(x), rtol=1e-10, atol=1e-10)


BEFORE = isinstance


class Square(torch.autograd.Function):
    """As the memory-efficient activations of libraries."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        [x] = ctx.saved_tensors
        return torch.mul(x, grads[0]) * 2


@pytest.mark.filterwarnings("ignore:To copy construct:UserWarning")
@pytest.mark.parametrize(
    "act",
    [
        Square.apply,
        lambda y: y + torch.as_tensor(y),
        lambda y: y + torch.asarray(y),
        lambda y: y + torch.full((1,), y.shape[1], dtype=y.dtype),
        lambda y: y + torch.full_like(y, 2).new_tensor(y),
        lambda y: y + torch.tensor([y.shape[1]], dtype=y.dtype),
        lambda y: y + torch.Tensor([y.shape[1]]).to(y),
        lambda y: y + torch.add(torch.ones(()), torch.ones(()), alpha=y.shape[1]).to(y),
    ],
)
def test_functions_that_would_take_a_proxy_for_a_tensor(act: Callable[[Tensor], Tensor]) -> None:
    """They end the process if C code believes a proxy that it is one."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Any:
            return act(self.norm(self.conv(x)))

    model, x = randomise(Net()).double(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    for form in ("graph", "module"):
        folded: nn.Module = bnfx.fold_bn(model, (x,), form=form)
        report = bnfx.report(folded)
        assert isinstance(report, FoldReport)
        assert not report.left
        torch.testing.assert_close(folded(x), model(x), rtol=1e-10, atol=1e-10)
    assert isinstance is BEFORE


def test_functions_of_sizes_are_recorded() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            rows = torch.arange(x.shape[0]) + torch.full((x.shape[0],), 2)
            return torch.full_like(x, 3.0) + x * rows[:, None]

    graph, _ = trace(Tracer, Net(), frozenset(), None)
    called = [getattr(node.target, "__name__", "") for node in graph.nodes]
    assert {"arange", "full", "full_like"} <= {*called}
