"""What the BatchNorms of a model read while it runs on batches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from bnfx.errors import CalibrationError
from bnfx.operators.calls import signature_of
from bnfx.operators.table import is_batch_norm_function
from bnfx.statistics.moments import Moments

Estimator = Literal["exact", "paper"]


@dataclass(frozen=True)
class Sums:
    """What one BatchNorm has seen so far."""

    pooled: Moments
    means: Tensor  #: sum over the batches
    variances: Tensor  #: likewise
    batches: int  #: how many had a variance

    @staticmethod
    def of(seen: Moments) -> Sums:
        """Those of one batch."""
        if seen.count < 2:
            return Sums(seen, torch.zeros_like(seen.mean), torch.zeros_like(seen.mean), 0)
        return Sums(seen, seen.mean, seen.variance, 1)

    def merged(self, other: Sums) -> Sums:
        """Those of both sets of batches."""
        return Sums(
            self.pooled.merged(other.pooled),
            self.means + other.means,
            self.variances + other.variances,
            self.batches + other.batches,
        )

    def to(self, device: torch.device | str) -> Sums:
        """The same on another device."""
        means, variances = self.means.to(device), self.variances.to(device)
        return Sums(self.pooled.to(device), means, variances, self.batches)

    def estimate(self, estimator: Estimator) -> tuple[Tensor, Tensor]:
        """Mean and variance."""
        if estimator == "exact" or not self.batches:
            return self.pooled.mean, self.pooled.variance
        return self.means / self.batches, self.variances / self.batches


@dataclass(frozen=True)
class Place:
    """Where the statistics of a BatchNorm are: which part of which buffers, by name."""

    mean: str
    var: str
    start: int
    stop: int

    @property
    def owner(self) -> str:
        """Path of the module that holds them."""
        return self.mean.rpartition(".")[0]

    def __str__(self) -> str:
        return repr(self.owner or self.mean)


class Watch(TorchFunctionMode):
    """Moments of what BatchNorms read while a model runs.

    A BatchNorm is a call of `batch_norm` on buffers of the model, whatever class makes it, or a
    module of torch's that makes none (SyncBatchNorm between processes).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.sums: dict[Place, Sums] = {}
        self.where = ""
        self.norms = {
            path: module
            for path, module in model.named_modules()
            if isinstance(module, _BatchNorm) and module.running_mean is not None
        }
        self.buffers = dict(model.named_buffers())
        self._names = {_storage(buffer): name for name, buffer in self.buffers.items()}
        self._calls = 0

    @contextmanager
    def open(self) -> Iterator[None]:
        """Listen while this is open."""
        with ExitStack() as stack:
            for norm in self.norms.values():
                before = norm.register_forward_pre_hook(self._enter, prepend=True)
                after = norm.register_forward_hook(self._leave, with_kwargs=True)
                stack.callback(before.remove)
                stack.callback(after.remove)
            with self:
                yield

    def place(self, mean: object, var: object) -> Place | None:
        """Where two running statistics are in the model; None if they are none of its buffers."""
        if not isinstance(mean, Tensor) or not isinstance(var, Tensor):
            return None
        names = self._names.get(_storage(mean)), self._names.get(_storage(var))
        if names[0] is None or names[1] is None:
            return None
        start = int(mean.storage_offset() - self.buffers[names[0]].storage_offset())
        return Place(names[0], names[1], start, start + mean.numel())

    def statistics(self, place: Place) -> tuple[Tensor, Tensor]:
        """The running mean and variance there."""
        mean, var = self.buffers[place.mean].flatten(), self.buffers[place.var].flatten()
        return mean[place.start : place.stop], var[place.start : place.stop]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,  # the signature is torch's
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call `func`, and look at what it reads if it is a BatchNorm."""
        kwargs = kwargs or {}
        if is_batch_norm_function(func):
            call = dict(zip(signature_of(func), args, strict=False)) | kwargs
            place = self.place(call.get("running_mean"), call.get("running_var"))
            if place is not None and (call.get("training") or place.owner in self.norms):
                self._see(place, call["input"], training=bool(call.get("training")))
        return func(*args, **kwargs)

    def _enter(self, *_: object) -> None:
        self._calls = 0

    def _leave(
        self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: object
    ) -> None:
        assert isinstance(norm, _BatchNorm)
        place = self.place(norm.running_mean, norm.running_var)
        if place is not None and not self._calls:
            self._see(place, args[0] if args else kwargs["input"], training=norm.training)

    def _see(self, place: Place, x: Tensor, *, training: bool) -> None:
        self._calls += 1
        seen = Moments.of(x)
        if seen.count < 2 and training:
            raise CalibrationError(
                f"{self.where}: {place} got one value per channel, and in train mode "
                "BatchNorm needs two; use larger batches, and drop_last=True in the loader"
            )
        if not bool(torch.isfinite(seen.m2).all()):
            channels = (~torch.isfinite(seen.m2)).nonzero().flatten().tolist()[:8]
            raise CalibrationError(
                f"{self.where}: the activations in front of {place} are NaN or infinite in "
                f"channels {channels}; check the data and the model"
            )
        known = [p for p in self.sums if p.mean == place.mean and p != place]
        if len(seen.mean) != place.stop - place.start or known:
            raise CalibrationError(
                f"{self.where}: {place} normalises another number of channels than before, or than "
                "it has statistics for, so that no one set of them serves all; run it in one width"
            )
        new = Sums.of(seen)
        self.sums[place] = self.sums[place].merged(new) if place in self.sums else new


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() or id(tensor)


def merge_ranks(watch: Watch) -> None:
    """Merge the moments of all ranks of torch.distributed, if it is initialised."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    everyone: list[dict[Place, Sums]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, {p: sums.to("cpu") for p, sums in watch.sums.items()})
    for place in dict.fromkeys(place for theirs in everyone for place in theirs):
        parts = [theirs[place] for theirs in everyone if place in theirs]
        device = watch.buffers[place.mean].device
        watch.sums[place] = functools.reduce(Sums.merged, parts).to(device)
