"""Statistics from data: for BatchNorms that are being inserted, and for those that are there.

Population statistics are those of Algorithm 2 in Ioffe & Szegedy 2015: of the activations in front
of each BatchNorm. `estimator="exact"` pools all values (see `bnfx.statistics.moments`), `"paper"`
averages the batches' means and unbiased variances.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnfx.errors import CalibrationError
from bnfx.graphs.examples import Example, modes_kept
from bnfx.statistics.batches import BatchReader, refuse_nan, with_progress
from bnfx.statistics.moments import Moments

Estimator = Literal["exact", "paper"]


@dataclass
class _Sums:
    """What one BatchNorm has seen so far."""

    pooled: Moments | None = None
    means: Tensor | None = None
    variances: Tensor | None = None
    batches: int = 0

    def add(self, seen: Moments) -> None:
        self.pooled = seen if self.pooled is None else self.pooled.merged(seen)
        if seen.count > 1:
            self.means = seen.mean if self.means is None else self.means + seen.mean
            variance = seen.variance
            self.variances = variance if self.variances is None else self.variances + variance
            self.batches += 1


@dataclass
class _Watch:
    """Moments of the inputs of BatchNorms while a model runs."""

    norms: Mapping[str, _BatchNorm]
    sums: dict[str, _Sums] = field(default_factory=dict)
    where: str = ""

    @contextmanager
    def open(self) -> Iterator[None]:
        """Listen while this is open."""
        with ExitStack() as stack:
            for path, norm in self.norms.items():
                listener = self._listener(path)
                handle = norm.register_forward_pre_hook(listener, prepend=True, with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def _listener(self, path: str) -> Callable[..., None]:
        def listen(norm: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            seen = Moments.of(args[0] if args else kwargs["input"])
            if seen.count < 2 and norm.training:
                raise CalibrationError(
                    f"{self.where}: {path!r} got one value per channel, and in train mode "
                    "BatchNorm needs two; use larger batches, and drop_last=True in the loader"
                )
            if not bool(torch.isfinite(seen.m2).all()):
                channels = (~torch.isfinite(seen.m2)).nonzero().flatten().tolist()[:8]
                raise CalibrationError(
                    f"{self.where}: the activations in front of {path!r} are NaN or infinite in "
                    f"channels {channels}; check the data and the model"
                )
            self.sums.setdefault(path, _Sums()).add(seen)

        return listen


def calibrate(
    model: nn.Module, norms: Mapping[str, _BatchNorm], batches: Iterable[Any], given: Example | None
) -> Example:
    """Give freshly inserted identities the statistics of their inputs; outputs do not change.

    mean and var are those of the data, gamma = sqrt(var + eps), beta = mean + c, where c is what
    the identity added before (the layer's old bias). One pass in eval mode, in which the identities
    still are identities, is enough for all layers.

    Args:
        model: In eval mode, with the identities in it.
        norms: The identities, by path.
        batches: The data.
        given: Example inputs, which tell how many entries of a tuple are inputs.

    Returns:
        The arguments of the first batch, to check the outputs with.

    Raises:
        CalibrationError: No data, NaN, a wrong shape, or too few values for a variance.
    """
    watch = _Watch(norms)
    first = _run_over(model, batches, watch, given, "calibrating BatchNorm", shown=True)
    _require_data(watch, "calibration_data")
    with torch.no_grad():
        for path, norm in norms.items():
            pooled = watch.sums[path].pooled if path in watch.sums else None
            if pooled is None:
                continue  # stays the identity that it is
            _require_variance(path, pooled)
            mean, variance = norm.running_mean, norm.running_var
            assert mean is not None
            assert variance is not None
            added = norm.bias - mean * norm.weight / (variance + norm.eps).sqrt()
            mean.copy_(pooled.mean)
            variance.copy_(pooled.variance)
            norm.weight.copy_((variance.double() + norm.eps).sqrt())
            norm.bias.copy_(mean.double() + added.double())
    return first


def recalibrate_bn(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    estimator: Estimator = "exact",
    progress: bool = True,
) -> nn.Module:
    """Set the running statistics of every BatchNorm of `model` to those of the data, in place.

    Like `torch.optim.swa_utils.update_bn`, the model runs in train mode, so that each BatchNorm
    normalises by its batch, and without gradients. Where torch.distributed is initialised, the
    moments of all ranks are merged, and every rank gets the same statistics. Momentum and training
    flags are as before afterwards, and after an exception the statistics are too.

    Args:
        model: Any module; also one wrapped in DistributedDataParallel.
        batches: Iterable of tensors, tuples (inputs first, labels are left out) or dicts.
        estimator: "exact" pools the values of all batches, whatever their sizes and order:
            mean = sum(x)/n, var = sum((x - mean)^2)/(n - 1). "paper" is Algorithm 2 of Ioffe &
            Szegedy 2015: E[x] = E_B[mean_B], Var[x] = m/(m-1) E_B[var_B], which is also what
            `update_bn` computes.
        progress: Whether to show a progress bar (on standard error, if that is a terminal).

    Returns:
        `model` itself.

    Raises:
        CalibrationError: No BatchNorm with running statistics, no data, NaN, a batch that does not
            fit, or one value per channel; the message names the module.
    """
    if estimator not in ("exact", "paper"):
        raise CalibrationError(f"estimator={estimator!r} is unknown; use 'exact' or 'paper'")
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    norms = {
        path: module
        for path, module in inner.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    if not norms:
        raise CalibrationError(
            f"{type(inner).__name__} has no BatchNorm with running statistics; insert_bn adds some"
        )
    watch = _Watch(norms)
    with _restored(inner, norms) as keep:
        inner.train()
        _run_over(inner, batches, watch, None, "recalibrating BatchNorm", shown=progress)
        _merge_ranks(watch)
        _require_data(watch, "batches")
        keep({path: _estimate(path, sums, estimator) for path, sums in watch.sums.items()})
    return model


_Statistics = tuple[Tensor, Tensor, int]


def _estimate(path: str, sums: _Sums, estimator: Estimator) -> _Statistics:
    assert sums.pooled is not None
    _require_variance(path, sums.pooled)
    if estimator == "exact" or sums.means is None or sums.variances is None:
        return sums.pooled.mean, sums.pooled.variance, sums.batches
    return sums.means / sums.batches, sums.variances / sums.batches, sums.batches


@contextmanager
def _restored(
    model: nn.Module, norms: Mapping[str, _BatchNorm]
) -> Iterator[Callable[[Mapping[str, _Statistics]], None]]:
    """Put training flags and statistics back at the end; what is given to the callable stays."""
    before = {path: _statistics(norm) for path, norm in norms.items()}
    after: dict[str, _Statistics] = {}
    try:
        with modes_kept(model):
            yield after.update
    finally:
        with torch.no_grad():
            for path, norm in norms.items():
                for tensor, old in zip(_buffers(norm), before[path], strict=True):
                    tensor.copy_(old)
                for tensor, new in zip(_buffers(norm), after.get(path, ()), strict=False):
                    tensor.copy_(torch.as_tensor(new))


def _buffers(norm: _BatchNorm) -> list[Tensor]:
    """running_mean, running_var, num_batches_tracked."""
    found = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    return [tensor for tensor in found if tensor is not None]


def _statistics(norm: _BatchNorm) -> list[Tensor]:
    return [tensor.clone() for tensor in _buffers(norm)]


def _run_over(
    model: nn.Module,
    batches: Iterable[Any],
    watch: _Watch,
    given: Example | None,
    task: str,
    *,
    shown: bool,
) -> Example:
    """Run `model` on every batch; the arguments of the first one."""
    reader = BatchReader(model, given)
    first: Example | None = None
    with torch.no_grad(), watch.open():
        for i, batch in enumerate(with_progress(batches, task, shown=shown)):
            watch.where = f"batch {i}"
            arguments = reader.read(batch)
            first = arguments if first is None else first
            refuse_nan(arguments, watch.where)
            _run(model, arguments, watch.where)
    return Example((), {}) if first is None else first


def _run(model: nn.Module, given: Example, where: str) -> None:
    try:
        model(*given.args, **given.kwargs)
    except CalibrationError:
        raise
    except Exception as error:  # a user's forward raises anything
        tensors = [x for x in (*given.args, *given.kwargs.values()) if isinstance(x, Tensor)]
        shapes = ", ".join(str(list(x.shape)) for x in tensors)
        raise CalibrationError(
            f"{where} (inputs {shapes or 'without tensors'}) does not fit the model: "
            f"{type(error).__name__}: {str(error).partition(chr(10))[0]}. Give batches as in "
            "training: tensors, tuples with the inputs first, or dicts of arguments; with more "
            "than one value per channel"
        ) from error


def _require_data(watch: _Watch, name: str) -> None:
    if not any(sums.pooled is not None for sums in watch.sums.values()):
        raise CalibrationError(
            f"{name} is empty, or no BatchNorm was reached; give at least one batch (a generator "
            "that was read before is empty)"
        )


def _require_variance(path: str, pooled: Moments) -> None:
    if pooled.count < 2:
        raise CalibrationError(
            f"{path!r} saw {pooled.count} value per channel, and a variance needs two; give more "
            "or larger batches"
        )


def _merge_ranks(watch: _Watch) -> None:
    """Merge the moments of all ranks of torch.distributed, if it is initialised."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    mine = {path: _to_cpu(sums) for path, sums in watch.sums.items()}
    everyone: list[dict[str, _Sums]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    watch.sums = {}
    for path, norm in watch.norms.items():
        parts = [theirs[path] for theirs in everyone if path in theirs]
        if parts:
            device = norm.weight.device if norm.weight is not None else None
            watch.sums[path] = _merged(parts, device)


def _to_cpu(sums: _Sums) -> _Sums:
    pooled = sums.pooled
    if pooled is not None:
        pooled = Moments(pooled.count, pooled.mean.cpu(), pooled.m2.cpu())
    means = None if sums.means is None else sums.means.cpu()
    variances = None if sums.variances is None else sums.variances.cpu()
    return _Sums(pooled, means, variances, sums.batches)


def _merged(parts: list[_Sums], device: torch.device | None) -> _Sums:
    total = _Sums()
    for part in parts:
        if part.pooled is not None:
            total.pooled = part.pooled if total.pooled is None else total.pooled.merged(part.pooled)
        if part.means is not None and part.variances is not None:
            means, variances = part.means.to(device), part.variances.to(device)
            total.means = means if total.means is None else total.means + means
            total.variances = variances if total.variances is None else total.variances + variances
        total.batches += part.batches
    if total.pooled is not None:
        pooled = total.pooled
        total.pooled = Moments(pooled.count, pooled.mean.to(device), pooled.m2.to(device))
    return total
