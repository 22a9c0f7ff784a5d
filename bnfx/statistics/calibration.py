"""Statistics from data: for BatchNorms that are being inserted, and for those that are there.

Population statistics are those of Algorithm 2 in Ioffe & Szegedy 2015: of the activations in front
of each BatchNorm. `estimator="exact"` pools all values (see `bnfx.statistics.moments`), `"paper"`
averages the batches' means and unbiased variances.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnfx.errors import CalibrationError
from bnfx.graphs.examples import Example, obstacle
from bnfx.graphs.tracing import attributes_kept
from bnfx.statistics.batches import BatchReader, refuse_nan, with_progress
from bnfx.statistics.moments import Moments
from bnfx.statistics.watching import Estimator, Watch, merge_ranks


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
    watch = Watch(model)
    first = _run_over(model, batches, watch, given, "calibrating BatchNorm", shown=True)
    _require_data(watch, "calibration_data")
    with torch.no_grad():
        for path, norm in norms.items():
            mean, variance = norm.running_mean, norm.running_var
            assert mean is not None
            assert variance is not None
            place = watch.place(mean, variance)
            if place is None or place not in watch.sums:
                continue  # stays the identity that it is
            pooled = watch.sums[place].pooled
            _require_variance(path, pooled)
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
    if said := obstacle(inner, wrappers=False):
        raise CalibrationError(said)
    watch = Watch(inner)
    others: set[str] = set()
    with attributes_kept(inner), _buffers_kept(inner, others) as put_back:
        _train(inner)
        task = "recalibrating BatchNorm"
        _run_over(inner, batches, watch, None, task, shown=progress, after_each=put_back)
        merge_ranks(watch)
        if not watch.norms and not watch.sums:
            raise CalibrationError(
                f"{type(inner).__name__} has no BatchNorm with running statistics; insert_bn adds "
                "some"
            )
        _require_data(watch, "batches")
        for place, sums in watch.sums.items():
            _require_variance(place.owner or place.mean, sums.pooled)
    others -= _set_statistics(watch, estimator)
    if others:
        warnings.warn(
            f"in train mode {type(inner).__name__} also writes {', '.join(sorted(others))}, which "
            "are no statistics of a call of batch_norm: they are as they were",
            stacklevel=2,
        )
    return model


def _train(model: nn.Module) -> None:
    try:
        model.train()
    except NotImplementedError as error:  # what the module of an exported program says
        raise CalibrationError(
            f"this {type(model).__name__} cannot train, as that of an exported program, whose "
            "statistics are fixed; recalibrate the torch.nn.Module that it was exported from, and "
            "export that anew"
        ) from error


def _set_statistics(watch: Watch, estimator: Estimator) -> set[str]:
    """Write what was seen; the names of the buffers that were written."""
    names = set()
    with torch.no_grad():
        for place, sums in watch.sums.items():
            for buffer, new in zip(watch.statistics(place), sums.estimate(estimator), strict=True):
                buffer.copy_(new)
            names |= {place.mean, place.var}
            count = f"{place.owner}.num_batches_tracked".lstrip(".")
            if count in watch.buffers:
                watch.buffers[count].fill_(sums.batches)
                names.add(count)
    return names


@contextmanager
def _buffers_kept(model: nn.Module, written: set[str]) -> Iterator[Callable[[], None]]:
    """Put the buffers back at the end, and when the callable is called; which were `written`.

    They are put back after each batch: a codebook that moves on, or a weight that is normalised
    otherwise, would give the next batch activations that the model as it is never has.
    """
    buffers = dict(model.named_buffers())
    before = {name: buffer.clone() for name, buffer in buffers.items()}

    def put_back() -> None:
        now = dict(model.named_buffers())
        written.update(name for name, buffer in buffers.items() if now.get(name) is not buffer)
        for name, buffer in buffers.items():
            if not _same(buffer, before[name]):
                buffer.copy_(before[name])
                written.add(name)

    try:
        yield put_back
    finally:
        with torch.no_grad():
            put_back()


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, NaN included."""
    return torch.equal(a, b) or (
        a.is_floating_point() and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    )


def _run_over(
    model: nn.Module,
    batches: Iterable[Any],
    watch: Watch,
    given: Example | None,
    task: str,
    *,
    shown: bool,
    after_each: Callable[[], None] = lambda: None,
) -> Example:
    """Run `model` on every batch; the arguments of the first one."""
    reader = BatchReader(model, given)
    first: Example | None = None
    # What is compiled runs as it is written: nobody can watch inside compiled code.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), watch.open():
        for i, batch in enumerate(with_progress(batches, task, shown=shown)):
            watch.where = f"batch {i}"
            arguments = reader.read(batch)
            first = arguments if first is None else first
            refuse_nan(arguments, watch.where)
            _run(model, arguments, watch.where)
            after_each()
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


def _require_data(watch: Watch, name: str) -> None:
    if not watch.sums:
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
