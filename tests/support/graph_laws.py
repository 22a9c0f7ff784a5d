"""The laws of folding on one network, stricter than `tests.laws`; a breach raises `Broken`."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import bnfx
from bnfx.gauges.written_out import AS_ARITHMETIC
from tests.support.laws import count_batch_norms

#: Bound of the float64 error, relative to the largest element of an output.
RELATIVE = 1e-10
#: The same relative to the largest intermediate value, for outputs that are left of a cancellation.
CANCELLED = 1e-13
#: The same relative to what a relative change of 1e-15 in all weights and inputs does.
CONDITION = 100.0

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")


class Broken(AssertionError):
    """A law does not hold."""


@dataclass(frozen=True)
class Outcome:
    """What a fold that kept the laws did.

    Attributes:
        evaluations: BatchNorm evaluations of the source.
        folded: Records with the verdict "folded".
        left: Records with another verdict.
        status: "ok"; "refused" (bnfx.CaptureError); "guarded" (without example inputs, the result
            refused to run); "unfit" (the source itself is not finite).
    """

    evaluations: int = 0
    folded: int = 0
    left: int = 0
    status: str = "ok"


class Watch(TorchFunctionMode):
    """The largest intermediate value, and the BatchNorm evaluations, of what runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0.0
        self.batch_norms = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.batch_norms += func is F.batch_norm
        if isinstance(out, Tensor) and out.is_floating_point() and out.numel():
            self.largest = max(self.largest, float(torch.nan_to_num(out.detach()).abs().max()))
        return out


@dataclass(frozen=True)
class Run:
    """Outputs of one evaluation, and the inputs as it left them."""

    outputs: tuple[Tensor, ...]
    inputs: tuple[Tensor, ...]
    largest: float
    batch_norms: int


def run(net: nn.Module, inputs: Sequence[Tensor]) -> Run:
    """One evaluation of a copy of `net` on copies of `inputs`."""
    given = copy.deepcopy(tuple(inputs))
    with torch.no_grad(), Watch() as watch:
        outputs = tuple(pytree.tree_leaves(copy.deepcopy(net)(*given)))
    return Run(outputs, given, watch.largest, watch.batch_norms)


def same(what: str, ours: Run, truth: Run, noise: Callable[[], list[float]] | None = None) -> None:
    """Equal outputs, of equal shape and type, and the same inputs left behind.

    Args:
        what: Opens the message.
        ours: Of the result.
        truth: Of the source.
        noise: How much each output of the source owes to rounding; asked only where it matters.
    """
    demand(len(ours.outputs) == len(truth.outputs), f"{what}: another number of outputs")
    for i, (a, b) in enumerate(zip(ours.outputs, truth.outputs, strict=True)):
        demand(a.shape == b.shape, f"{what}: output {i} has shape {a.shape}, not {b.shape}")
        demand(a.dtype == b.dtype, f"{what}: output {i} is {a.dtype}, not {b.dtype}")
        bound = RELATIVE * float(b.abs().max()) + CANCELLED * truth.largest
        error = float((a - b).abs().max())
        if error > bound and noise is not None:
            bound += CONDITION * noise()[i]
        demand(error <= bound, f"{what}: output {i} is off by {error:.3g}, allowed {bound:.3g}")
    for a, b in zip(ours.inputs, truth.inputs, strict=True):
        demand(torch.allclose(a, b, rtol=1e-10, atol=1e-12), f"{what}: an input is left different")


def sensitivity(net: nn.Module, inputs: Sequence[Tensor]) -> list[float]:
    """How far each output moves when all weights and inputs change by some 1e-15 of themselves."""
    truth, shaken = run(net, inputs), copy.deepcopy(net)
    generator = torch.Generator().manual_seed(0)

    def shake(x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        return x * (1 + 1e-15 * noise) if x.dtype is torch.float64 else x

    moved = [0.0] * len(truth.outputs)
    for _ in range(3):
        with torch.no_grad():
            for tensor in {*shaken.parameters(), *shaken.buffers()}:
                tensor.copy_(shake(tensor))
        again = run(shaken, [shake(x) for x in inputs])
        pairs = zip(again.outputs, truth.outputs, strict=True)
        moved = [max(m, float((a - b).abs().max())) for m, (a, b) in zip(moved, pairs, strict=True)]
    return moved


#: What the reasons say of a BatchNorm that stays for the sake of digits.
NUMERIC = ("costs digits", "times their size", "numerically sound")


def demand(holds: bool, message: str) -> None:  # noqa: FBT001  # the sentence reads as assert does
    """Raise `Broken` with `message` unless `holds`."""
    if not holds:
        raise Broken(message)


def snapshot(net: nn.Module) -> dict[str, Any]:
    """All of `net` that a fold must leave as it is."""
    found: dict[str, Any] = {}
    for path, module in net.named_modules(remove_duplicate=False):
        found[path] = (id(module), module.training, sorted(module.__dict__))
        for hooks in _HOOKS:
            found[f"{path}/{hooks}"] = dict(getattr(module, hooks))
    tensors = [*net.named_parameters(remove_duplicate=False), *net.named_buffers()]
    for name, tensor in tensors:
        bits = (tensor.detach().clone(), tensor._version, tensor.requires_grad, tensor.grad)
        found[f"{name}/tensor"] = (id(tensor), *bits)
    return found


def _equal(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b


def options_of_fold_bn(*, given: bool) -> tuple[str, ...]:
    """The switches that this `fold_bn` has, by name; some need example inputs."""
    parameters = inspect.signature(bnfx.fold_bn).parameters.values()
    names = tuple(p.name for p in parameters if isinstance(p.default, bool))
    return names if given else tuple(name for name in names if name != "border_maps")


def check(
    net: nn.Module,
    inputs: Sequence[Tensor],
    *,
    given: bool,
    others: Sequence[Sequence[Tensor]] = (),
    **options: Any,
) -> Outcome:
    """Fold `net` and hold the result against every law.

    Args:
        net: A network in float64.
        inputs: Its inputs.
        given: Whether `fold_bn` gets them as example inputs.
        others: Other inputs, such as other batch sizes; those that the source refuses are skipped.
        options: Passed on to `fold_bn`.
    """
    truth = run(net, inputs)
    if not all(bool(out.isfinite().all()) for out in truth.outputs):
        return Outcome(status="unfit")
    examples = copy.deepcopy(tuple(inputs)) if given else None
    before = snapshot(net)
    try:
        folded = bnfx.fold_bn(net, examples, **options)
    except bnfx.CaptureError:
        return Outcome(truth.batch_norms, status="refused")
    after = snapshot(net)
    changed = [k for k in before.keys() | after.keys() if not _equal(before.get(k), after.get(k))]
    demand(not changed, f"the source changed: {sorted(changed)}")
    demand(_equal(examples or (), tuple(inputs)[: len(examples or ())]), "an example changed")
    try:
        same("folded", run(folded, inputs), truth, lambda: sensitivity(net, inputs))
    except AssertionError as guard:
        if given or isinstance(guard, Broken) or "example_inputs" not in str(guard):
            raise
        return Outcome(truth.batch_norms, status="guarded")
    outcome = check_records(folded, truth.batch_norms)
    check_again(folded, inputs, given=given, **options)
    for other in others:
        _check_other(net, folded, other)
    return outcome


def check_records(folded: fx.GraphModule, evaluations: int) -> Outcome:
    """One record for each evaluation, a reason for each that stays, and as many left as it says."""
    records = bnfx.report(folded).to_dict()["batch_norms"]
    demand(len(records) >= evaluations, f"{evaluations} evaluations have {len(records)} records")
    verdicts = [record["verdict"] for record in records]
    for record in records:
        told = record["reason"] or (record["verdict"] == "folded" and record["into"])
        demand(
            bool(told), f"{record['path']} is {record['verdict']}, nothing says into what or why"
        )
    operators = [r for r in records if not r["reason"].startswith(AS_ARITHMETIC)]
    counted = count_batch_norms(folded)
    kept = sum(record["verdict"] == "kept" for record in operators)
    demand(
        kept <= counted <= kept + verdicts.count("reduced"),
        f"{counted} BatchNorms are in the graph, the report says {verdicts}",
    )
    done = verdicts.count("folded")
    return Outcome(evaluations, done, len(verdicts) - done)


def check_again(
    folded: fx.GraphModule, inputs: Sequence[Tensor], *, given: bool, **options: Any
) -> None:
    """Folding what is folded computes the same and folds nothing more.

    It may fold more where a choice would have cost digits: that is judged by the statistics of the
    BatchNorms that stay, and what lies between them is another tensor now.
    """
    again = bnfx.fold_bn(folded, copy.deepcopy(tuple(inputs)) if given else None, **options)
    noise = functools.partial(sensitivity, folded, inputs)
    same("folded twice", run(again, inputs), run(folded, inputs), noise)
    first, second = count_batch_norms(folded), count_batch_norms(again)
    numeric = any(
        words in record["reason"]
        for record in bnfx.report(folded).to_dict()["batch_norms"]
        for words in NUMERIC
    )
    demand(
        second == first or (numeric and second < first),
        f"folding left {first} BatchNorms, folding twice {second}",
    )


def _check_other(net: nn.Module, folded: nn.Module, inputs: Sequence[Tensor]) -> None:
    try:
        truth = run(net, inputs)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return
    shapes = [tuple(x.shape) for x in inputs]
    try:
        ours = run(folded, inputs)
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
        if str(error).startswith("Guard failed"):
            return  # the exporter took a size for fixed, and the result says so
        raise Broken(
            f"on inputs of {shapes} the source runs, the result does not: {error}"
        ) from error
    same(f"on inputs of {shapes}", ours, truth, lambda: sensitivity(net, inputs))
