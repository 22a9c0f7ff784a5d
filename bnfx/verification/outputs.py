"""When two tensors count as equal: errors as ratios, and the errors that have no ratio.

    err(y) = rms(y - y64) / rms(y64)        ratio = err(y) / budget

y64 is the reference in float64; the budget is the error of the reference itself in the deployed
precision, at least one unit of rounding. A fixed absolute tolerance would miss faults on small
outputs and raise false alarms on large ones.

A budget is one only while both arithmetics compute the same function: where they part, there is no
truth to compare with, and nothing is verified.

One kernel is right to its range only: onnxruntime's Sigmoid ends at 1.5e-8 and errs by up to 1e-7
(measured). Where an output comes from it and fails otherwise, the reference may differ by as much,
and the file, as everywhere, by a few times of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx

from bnfx.numbers import UNIT, Array, Floats, relative_error
from bnfx.operators.calls import words


@dataclass(frozen=True)
class OutputCheck:
    """The verdict on one output, pooled over all inputs."""

    #: Name in the file.
    name: str
    #: Shape for the first input.
    shape: tuple[int, ...]
    #: As onnxruntime returned it.
    dtype: str
    #: Relative root mean square error against float64; 0 for integers and booleans.
    err: float
    #: What the unfolded model itself errs in the deployed precision.
    budget: float
    #: err / budget.
    ratio: float
    #: Whether the output counts as equal.
    passed: bool
    #: Why not; empty if it does.
    reason: str
    #: Whether the reference is one function in both arithmetics; otherwise nothing was verified.
    comparable: bool = True
    #: Differences of the reference up to this one did not count.
    resolution: float = 0.0


#: What onnxruntime's Sigmoid errs by at most, measured over all of its range.
SIGMOID = 2.0**-23
_MOVES = words(
    "Cast Concat Flatten Gather Identity Reshape Slice Split Squeeze Transpose Unsqueeze"
)


def resolution_of(model: onnx.ModelProto, output: str) -> float:
    """What the kernel behind an output resolves, absolutely; 0 where it is relative."""
    makers = {name: node for node in model.graph.node for name in node.output}
    waiting, seen = [output], set()
    while waiting:
        name = waiting.pop()
        node = makers.get(name)
        if node is None or name in seen:
            continue
        seen.add(name)
        if node.op_type == "Sigmoid":
            return SIGMOID
        waiting += node.input if node.op_type in _MOVES else ()
    return 0.0


def check_output(
    name: str,
    ours: Sequence[Array],
    own: Sequence[Array],
    truth: Sequence[Array],
    *,
    unit: float,
    max_ratio: float,
    sound: float = math.inf,
    resolution: float = 0.0,
) -> OutputCheck:
    """Compare one output over all inputs.

    Args:
        name: Name of the output.
        ours: What onnxruntime computed, one array for each input.
        own: What the unfolded model computes in its own precision.
        truth: What it computes in float64 (integers and booleans as they are).
        unit: Least budget.
        max_ratio: Limit of err / budget.
        sound: Largest budget of a reference that is one function in both arithmetics.
        resolution: What the kernel that gives it resolves (`resolution_of`).
    """
    check = _compared(name, ours, own, truth, unit, max_ratio, sound)
    if check.passed or not resolution or any(map(_another_kind, ours, own)):
        return check
    if not any((np.abs(part) > resolution).any() for part in truth):
        said = f"all of it is below {resolution:.1e}, less than onnxruntime's Sigmoid resolves"
        return replace(check, passed=False, reason=said, comparable=False)
    mine = _snapped(ours, truth, max_ratio * resolution)
    again = _compared(name, mine, _snapped(own, truth, resolution), truth, unit, max_ratio, sound)
    return replace(again, resolution=resolution)


def _snapped(values: Sequence[Array], truth: Sequence[Array], resolution: float) -> list[Array]:
    """Values, the truth where they are as near as that."""
    pairs = [(v, _wide(t), _wide(v)) for v, t in zip(values, truth, strict=True)]
    return [np.where(np.abs(w - t) <= resolution, t, w).astype(v.dtype) for v, t, w in pairs]


def _compared(
    name: str,
    ours: Sequence[Array],
    own: Sequence[Array],
    truth: Sequence[Array],
    unit: float,
    max_ratio: float,
    sound: float,
) -> OutputCheck:
    shape, dtype = tuple(ours[0].shape), str(ours[0].dtype)
    reason = next(filter(None, map(_another_kind, ours, own)), "")
    parted = "" if reason else parting(own, truth, sound)
    if parted:
        said = f"the reference computes another thing in float64 than it does itself: {parted}"
        lost = (math.inf, math.inf, math.inf)
        return OutputCheck(name, shape, dtype, *lost, passed=False, reason=said, comparable=False)
    reason = reason or next(filter(None, map(_mismatch, ours, own, truth)), "")
    err, budget = 0.0, unit
    if not reason and np.issubdtype(truth[0].dtype, np.inexact):
        err, budget = relative_error(ours, truth), max(relative_error(own, truth), unit)
        if math.isinf(budget):  # zero in float64, noise in practice: held to that noise
            err, budget = _magnitude(ours), _magnitude(own)
        if not err <= max_ratio * budget:
            reason = f"its error is {err / budget:.3g} times the unfolded model's own"
    elif not reason and not all(map(_one_of, ours, own, truth)):
        reason = "its integers or booleans differ"
    nowhere = not reason and _nowhere_finite(truth)
    if nowhere:
        reason = "the reference is NaN or infinite everywhere, which verifies nothing"
    return OutputCheck(
        name, shape, dtype, err, budget, err / budget, not reason, reason, comparable=not nowhere
    )


def parting(own: Sequence[Array], truth: Sequence[Array], limit: float) -> str:
    """How a reference parts from its own float64; "" while both are the same function.

    Args:
        own: What it computes itself, one array for each input.
        truth: The same in float64.
        limit: Largest relative error, and share of integers, NaNs and infinities that are others.
    """
    for a, b in zip(own, truth, strict=True):
        if a.shape != b.shape:
            return f"its shape is {list(b.shape)} there, not {list(a.shape)}"
        if np.issubdtype(a.dtype, np.inexact) != np.issubdtype(b.dtype, np.inexact):
            return f"its dtype is {b.dtype} there, not {a.dtype}"
    count = sum(a.size for a in own) or 1
    if not np.issubdtype(truth[0].dtype, np.inexact):
        others = sum(int((a != b).sum()) for a, b in zip(own, truth, strict=True))
        return f"{others} of {count} values are others" if others > limit * count else ""
    finite = [(np.isfinite(a), np.isfinite(b)) for a, b in zip(map(_wide, own), truth, strict=True)]
    others = sum(int((a != b).sum()) for a, b in finite)
    if others > limit * count:
        return f"{others} of {count} values are NaN or infinite in one alone"
    both = [a & b for a, b in finite]
    values, exact = ([x[m] for x, m in zip(part, both, strict=True)] for part in (own, truth))
    error = relative_error(values, exact)
    if math.isinf(error):  # zero in float64, noise in practice
        error = _magnitude(values)
    return f"a difference of {error:.1e}" if error > limit else ""


def _wide(array: Array) -> Any:
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def _one_of(ours: Array, own: Array, truth: Array) -> bool:
    """Whether integers are those of the reference; near a tie they may be either of its two."""
    return bool(((ours == truth) | (ours == own)).all())


def _magnitude(values: Sequence[Array]) -> float:
    """Root mean square of the finite entries, pooled."""
    flat = np.concatenate([value.astype(np.float64).reshape(-1) for value in values])
    return float(np.sqrt(np.square(flat[np.isfinite(flat)]).mean()))


def _nowhere_finite(truth: Sequence[Array]) -> bool:
    wide = [array.astype(np.float64) for array in truth]
    return any(array.size for array in wide) and not any(np.isfinite(array).any() for array in wide)


def _another_kind(ours: Array, own: Array) -> str:
    """What makes two arrays incomparable; "" if nothing does."""
    if ours.shape != own.shape:
        return f"its shape is {list(ours.shape)}, not {list(own.shape)}"
    if ours.dtype != own.dtype:
        return f"its dtype is {ours.dtype}, not {own.dtype}"
    if ours.size == 0:
        return "it is empty, which verifies nothing"
    return ""


def _mismatch(ours: Array, own: Array, truth: Array) -> str:
    """NaNs and infinities that are not those of the reference; "" if there are none."""
    if not np.issubdtype(truth.dtype, np.inexact):
        return ""
    finite = np.isfinite(truth.astype(np.float64)) & np.isfinite(own.astype(np.float64))
    new = int((finite & ~np.isfinite(ours.astype(np.float64))).sum())
    if new:
        return f"{new} values are NaN or infinite where the reference is finite"
    odd = ~np.isfinite(own.astype(np.float64))
    if not np.array_equal(
        ours[odd].astype(np.float64), own[odd].astype(np.float64), equal_nan=True
    ):
        return "its NaNs and infinities are not those of the reference"
    return ""


def weight_ratio(
    stored: Array, exact: Array, unit: float, *, per_channel: bool = True
) -> tuple[float, int]:
    """Largest distance of a weight from its float64 value, in units of rounding, and its channel.

    The unit of output channel c is `unit` times the largest finite magnitude in that channel, so
    that a small channel is judged as strictly as a large one. Infinities (bounds that bound
    nothing) and NaNs must be those of `exact`.

    Args:
        stored: (channels, everything else).
        exact: Of the same shape, in float64.
        unit: Relative error of one rounding.
        per_channel: Whether each channel has a unit of its own; otherwise the largest one counts.
    """
    if not exact.size:
        return 0.0, 0
    step = max(1, _BLOCK // exact.shape[1])
    blocks = [slice(i, i + step) for i in range(0, len(exact), step)]
    found = [_farthest(stored[rows], exact[rows]) for rows in blocks]
    rows, distance = (np.concatenate(part) for part in zip(*found, strict=True))
    scale = (rows if per_channel else np.full_like(rows, rows.max())) * unit
    # Half of the smallest subnormal is lost below the normal range whatever one does.
    scale = scale + (2.0**-25 if unit == UNIT["fp16"] else float(_TINY))
    with np.errstate(invalid="ignore", over="ignore"):
        distance = distance / scale
    distance = np.where(np.isfinite(distance), distance, math.inf)
    worst = int(np.argmax(distance))
    return float(distance[worst]), worst


def _farthest(stored: Array, exact: Array) -> tuple[Floats, Floats]:
    """Largest finite magnitude of each row of `exact`, and how far `stored` is from it at most."""
    wide, truth = stored.astype(np.float64), exact.astype(np.float64)
    rows = np.where(np.isfinite(truth), np.abs(truth), 0.0).max(axis=1)
    with np.errstate(invalid="ignore", over="ignore"):
        same = (wide == truth) | (np.isnan(wide) & np.isnan(truth))
        return rows, np.where(same, 0.0, np.abs(wide - truth)).max(axis=1)


_BLOCK = 2**22  # elements that are compared at a time, to bound the memory
_TINY = np.finfo(np.float32).smallest_subnormal
