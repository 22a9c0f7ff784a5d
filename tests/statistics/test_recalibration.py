"""recalibrate_bn on norms of any class, and on buffers that are no statistics."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as old_spectral_norm

import bnfx
from tests.support.laws import assert_same_state


def batches() -> list[Tensor]:
    return list((torch.randn(48, 3) * torch.arange(1, 4) + 2).split(16))


class Own(nn.Module):
    """A norm of a user's, of no class of torch's."""

    mu: Tensor
    variance: Tensor

    def __init__(self, channels: int, momentum: float = 0.1) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mu", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mu, self.variance, None, None, self.training, self.momentum)


class Keywords(Own):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            running_var=self.variance, input=x, running_mean=self.mu, training=self.training
        )


class Low(Own):
    def forward(self, x: Tensor) -> Tensor:
        args = (self.training, self.momentum, 1e-5, False)
        return torch.batch_norm(x, None, None, self.mu, self.variance, *args)


class Overload(Own):
    def forward(self, x: Tensor) -> Tensor:
        args = (self.training, self.momentum, 1e-5, False)
        out: Tensor = torch.ops.aten.batch_norm.default(
            x, None, None, self.mu, self.variance, *args
        )
        return out


class Slice(Own):
    """Of ten channels it uses those that it gets."""

    def __init__(self, channels: int) -> None:
        super().__init__(10)

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.mu[: x.shape[1]], self.variance[: x.shape[1]]
        return F.batch_norm(x, mean, var, None, None, self.training, self.momentum)


class Arithmetic(nn.BatchNorm1d):
    """A subclass that calls no function of torch's."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        if not self.training:
            return (x - self.running_mean) / (self.running_var + self.eps).sqrt()
        var, mean = torch.var_mean(x, 0, unbiased=False)
        self.running_mean.lerp_(mean.detach(), 0.1)
        self.running_var.lerp_(var.detach(), 0.1)
        return (x - mean) / (var + self.eps).sqrt()


@pytest.mark.parametrize("kind", [Own, Keywords, Low, Overload, Slice, Arithmetic])
def test_a_norm_of_any_class_gets_the_statistics_of_a_batch_norm(
    kind: Callable[[int], nn.Module],
) -> None:
    ours = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 5), kind(5))
    theirs = copy.deepcopy(ours)
    theirs[3] = nn.BatchNorm1d(5)
    data = batches()
    for model in (ours, theirs):
        bnfx.recalibrate_bn(model, data, progress=False)
    mean, variance = list(ours[3].buffers())[:2]
    torch.testing.assert_close(mean[:5], theirs[3].running_mean)
    torch.testing.assert_close(variance[:5], theirs[3].running_var)
    assert not mean[5:].any(), "a channel that was never seen keeps what it had"
    torch.testing.assert_close(ours[1].running_var, theirs[1].running_var)


class Widths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = Slice(10)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.norm(x).sum(), self.norm(x[:, :2]).sum()])


class Unlike(nn.BatchNorm1d):
    """It reads more channels than it has statistics for."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("build", [Widths, lambda: nn.Sequential(nn.Linear(3, 6), Unlike(3))])
def test_one_set_of_statistics_for_several_widths_is_refused(
    build: Callable[[], nn.Module],
) -> None:
    model = build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(bnfx.CalibrationError, match=r"norm|'1'"):
        bnfx.recalibrate_bn(model, batches(), progress=False)
    assert_same_state(model.state_dict(), before)


class Codebook(nn.Module):
    """A moving average that is none of a norm's."""

    codes: Tensor
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(5, 4))
        self.register_buffer("seen", torch.tensor(0))
        self.register_buffer("unused", torch.full((3,), torch.nan))

    def forward(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(x, self.codes).argmin(1)
        if self.training:
            self.codes.data[nearest] += 0.5 * (x.detach() - self.codes[nearest])
            self.seen = self.seen + 1
        return x + (self.codes[nearest] - x).detach()


class ByHand(Own):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mu.lerp_(x.detach().mean(0), 0.1)
        return x - self.mu


OTHERS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "codebook": (Codebook, {"2.codes", "2.seen"}),
    "by hand": (lambda: ByHand(4), {"2.mu"}),
    "instance norm": (
        lambda: nn.Sequential(
            nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten()
        ),
        {"2.1.running_mean", "2.1.running_var"},
    ),
    "spectral norm": (
        lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
        {"2.parametrizations.weight.0._u", "2.parametrizations.weight.0._v"},
    ),
    "old spectral norm": (lambda: old_spectral_norm(nn.Linear(4, 4)), {"2.weight_u", "2.weight_v"}),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_buffers_that_are_no_statistics_stay_and_are_named(kind: str) -> None:
    build, expected = OTHERS[kind]
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), build(), nn.BatchNorm1d(4))
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match="in train mode Sequential also writes") as told:
        bnfx.recalibrate_bn(model, batches(), progress=False)
    assert set(str(told[0].message).split("writes ")[1].split(", which")[0].split(", ")) == expected
    after = model.state_dict()
    for name in before.keys() - {f"{i}.{key}" for i in (1, 3) for key in model[1].state_dict()}:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0, equal_nan=True)
    assert all(not torch.equal(after[f"{i}.running_var"], torch.ones(4)) for i in (1, 3))


def test_each_batch_meets_the_buffers_as_they_are() -> None:
    """The norm behind a codebook gets the same statistics from batches in any order."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), Codebook(), nn.BatchNorm1d(4))
    other, data = copy.deepcopy(model), batches()
    with warnings.catch_warnings(action="ignore"):
        bnfx.recalibrate_bn(model, data, progress=False)
        bnfx.recalibrate_bn(other, data[::-1], progress=False)
    torch.testing.assert_close(model[2].running_var, other[2].running_var)


def test_what_a_forward_keeps_in_attributes_is_as_before() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.calls = nn.BatchNorm1d(3), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return torch.relu(self.norm(x))

    model = Counting().eval()
    bnfx.recalibrate_bn(model, batches(), progress=False)
    assert (model.calls, model.training, model.norm.training) == (0, False, False)


def test_lazy_modules_that_never_ran_are_refused() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    with pytest.raises(bnfx.CalibrationError, match=r"'0.weight' has no shape yet"):
        bnfx.recalibrate_bn(model, batches(), progress=False)
    assert isinstance(model[0], nn.LazyLinear)
