"""BatchNorms written as arithmetic: one record for each evaluation, whatever its class."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnfx
from bnfx.reports.report import FoldRecord, FoldReport
from tests.support import zoo
from tests.support.laws import assert_close, check_fold

_SHAPE = (1, -1, 1, 1)


def at_once(m: Any, x: Tensor) -> Any:
    scale = (m.weight * (m.running_var + 1e-5).rsqrt()).reshape(_SHAPE)
    return x * scale + (m.bias.reshape(_SHAPE) - m.running_mean.reshape(_SHAPE) * scale)


def in_steps(m: Any, x: Tensor) -> Any:
    x = (x - m.running_mean[None, :, None, None]) / torch.sqrt(m.running_var + 1e-3).view(_SHAPE)
    return m.weight.view(_SHAPE) * x + m.bias.view(_SHAPE)


def methods(m: Any, x: Tensor) -> Any:
    return x.sub(m.running_mean.view(_SHAPE)).mul(m.running_var.add(0.1).rsqrt().view(_SHAPE))


FORMS = {"at once": at_once, "in steps": in_steps, "methods": methods}


class Statistics(nn.Module):
    """Running statistics and an affine map as buffers, as frozen BatchNorms keep them."""

    def __init__(self, form: Callable[[Any, Tensor], Any], channels: int = 4) -> None:
        super().__init__()
        self.form = form
        generator = torch.Generator().manual_seed(channels)
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels, generator=generator) + 0.5)

    def forward(self, x: Tensor) -> Any:
        return self.form(self, x)


class Net(nn.Module):
    """Parts by name and a forward; `branches` makes symbolic tracing fail, so it is exported."""

    def __init__(self, body: Callable[[Any, Tensor], Any], **parts: nn.Module) -> None:
        super().__init__()
        self.body, self.branches = body, False
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Any:
        if self.branches and x.shape[1] > 99:
            x = x + 1
        return self.body(self, x)


def report_of(net: Net, how: str) -> FoldReport:
    """Fold in float64, and hold the outputs against the source's."""
    torch.manual_seed(0)
    net.eval().double()
    net.branches = how == "exported"
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    folded = bnfx.fold_bn(net, None if how == "traced" else (x,))
    assert_close(net, folded, [x])
    done = bnfx.report(folded)
    assert isinstance(done, FoldReport)
    return done


def records_of(net: Net, how: str) -> tuple[FoldRecord, ...]:
    return report_of(net, how).batch_norms


@pytest.mark.parametrize("how", ["traced", "example", "exported"])
@pytest.mark.parametrize("form", FORMS)
def test_each_evaluation_has_one_record(form: str, how: str) -> None:
    def body(m: Any, x: Tensor) -> Any:
        y = F.relu(m.norm(m.conv(x)))
        return F.gelu(m.norm(m.norm(m.last[0](y)))) + m.last[1](y)

    last = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1), Statistics(FORMS[form])])
    net = Net(body, conv=nn.Conv2d(4, 4, 3), norm=Statistics(FORMS[form]), last=last)
    records = records_of(net, how)
    assert [r.path for r in records] == ["norm", "norm", "norm", "last.1"]
    assert [r.verdict for r in records[:3]] == ["folded"] * 3
    assert all("conv" in r.into or "last.0" in r.into for r in records[:3])
    assert records[3].verdict == "kept"  # its input is read elsewhere, its output is one of a sum


@pytest.mark.parametrize("how", ["traced", "example", "exported"])
def test_what_must_stay_says_why(how: str) -> None:
    def body(m: Any, x: Tensor) -> Any:
        y = F.gelu(m.conv(x))
        return F.gelu(m.norm(y)) + y

    net = Net(body, conv=nn.Conv2d(4, 4, 3), norm=Statistics(at_once))
    done = report_of(net, how)
    (record,) = done.batch_norms
    assert (done.unavoidable, done.proved) == (1, True)
    assert (record.path, record.verdict, record.into) == ("norm", "kept", ())
    assert record.reason.startswith("it is written as arithmetic, and mul 'norm' stays: its scale")
    assert "gelu" in record.reason


def test_a_function_on_the_statistics_of_another_module_counts() -> None:
    net = Net(lambda m, x: at_once(m.bn, m.conv(x)), conv=nn.Conv2d(4, 4, 3), bn=nn.BatchNorm2d(4))
    (record,) = records_of(net, "traced")
    assert (record.path, record.verdict, record.into) == ("bn", "folded", ("conv",))


def test_statistics_that_are_read_for_something_else_are_no_evaluation() -> None:
    def body(m: Any, x: Tensor) -> Any:
        return F.gelu(m.bn(m.conv(x))) + m.bn.running_mean.view(_SHAPE)

    net = Net(body, conv=nn.Conv2d(4, 4, 3), bn=nn.BatchNorm2d(4))
    assert [(r.path, r.verdict) for r in records_of(net, "traced")] == [("bn", "folded")]


def test_before_a_layer_that_pads_nothing_it_goes_forward() -> None:
    net = Net(lambda m, x: m.conv(m.norm(x)), conv=nn.Conv2d(4, 5, 3), norm=Statistics(in_steps))
    (record,) = records_of(net, "example")
    assert (record.verdict, record.into) == ("folded", ("conv",))
    (record,) = records_of(net, "traced")  # the convolution tells the rank of the input
    assert (record.verdict, record.into) == ("folded", ("conv",))
    double = net.double().eval()
    folded, x = bnfx.fold_bn(double), torch.randn(2, 4, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(folded(x), double(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("before", [True, False])
def test_constants_that_raise_the_rank_hold_for_one_rank_only(before: bool) -> None:  # noqa: FBT001  # drawn by pytest
    def body(m: Any, x: Tensor) -> Any:
        return m.norm(m.conv(x)) if before else m.conv(m.norm(x))

    net = Net(body, conv=nn.Conv2d(4, 4, 3), norm=Statistics(in_steps)).double().eval()
    folded, x = bnfx.fold_bn(net), torch.randn(4, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(folded(x[None]), net(x[None]), rtol=1e-10, atol=1e-10)
    assert net(x).dim() == 4
    with pytest.raises(AssertionError, match="hold for rank 4 only"):
        folded(x)


def test_in_merged_branches_it_is_recorded_with_the_layer_that_took_it() -> None:
    def body(m: Any, x: Tensor) -> Any:
        return F.gelu(m.a(m.three(x)) + m.b(m.one(x)) + m.c(x))

    parts = {name: Statistics(at_once) for name in "abc"}
    net = Net(body, three=nn.Conv2d(4, 4, 3, padding=1), one=nn.Conv2d(4, 4, 1), **parts)
    records = records_of(net, "example")
    assert [(r.path, r.verdict) for r in records] == [(name, "folded") for name in "abc"]
    assert all(r.into == ("three.merged",) for r in records)


def test_inside_a_module_with_hooks_it_is_kept_and_recorded() -> None:
    norm = Statistics(at_once)
    net = Net(lambda m, x: m.norm(m.conv(x)), conv=nn.Conv2d(4, 4, 3), norm=norm)
    norm.register_forward_hook(lambda *_: None)
    (record,) = records_of(net, "traced")
    assert (record.path, record.verdict) == ("norm", "kept")
    assert "hooks" in record.reason


@pytest.mark.zoo
def test_torchvision_with_frozen_norms_folds_whole() -> None:
    models = zoo.torchvision_models()
    frozen = importlib.import_module("torchvision.ops").FrozenBatchNorm2d
    torch.manual_seed(0)
    net = models.resnet50(norm_layer=frozen).eval()
    norms = [name for name, module in net.named_modules() if isinstance(module, frozen)]
    for name in norms:
        norm = net.get_submodule(name)
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 1.5)
    verdicts = check_fold(net, torch.randn(1, 3, 32, 32))
    assert verdicts == ["folded"] * len(norms) == ["folded"] * 53
