"""Whether a model with inserted identities still computes what it did."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from bnfx.errors import InsertError
from bnfx.graphs.agreement import alike, bound, nearly
from bnfx.graphs.examples import Example, clone, modes_kept, untouched
from bnfx.graphs.observed import tensors_in, undisturbed_random_state
from bnfx.graphs.training import ModuleGraph
from bnfx.numbers import relative_error

#: Roundings that one BatchNorm may add: gamma, 1/sqrt, two products, two sums, with a margin of 2.
_MAX_ROUNDINGS = 16
#: How many times the source's own error against float64 the outputs may have. Where every site is
#: an identity up to rounding this is far from reached; without float64 truth it bounds the change.
_MAX_RATIO = 16.0


@dataclass
class _Sites:
    """How far each BatchNorm is from adding a constant, in roundings of its terms."""

    added: Mapping[str, Tensor | None]
    roundings: dict[str, float] = field(default_factory=dict)

    def listener(self, path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def listen(norm: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            assert isinstance(norm, _BatchNorm)
            x, y = args[0].double(), out.double()
            shape = (1, -1, *[1] * (x.dim() - 2))
            bias, mean = self.added[path], norm.running_mean
            assert mean is not None
            added = x.new_zeros(1) if bias is None else bias.double().reshape(shape)
            terms = x.abs() + mean.double().abs().reshape(shape) + added.abs()
            unit = torch.finfo(out.dtype).eps
            apart = ((y - (x + added)).abs() / (unit * terms).clamp_min(1e-300)).max()
            self.roundings[path] = max(self.roundings.get(path, 0.0), float(apart))

        return listen


def require_same_outputs(
    source: nn.Module,
    inserted: nn.Module,
    added: Mapping[str, Tensor | None],
    given: Example,
) -> None:
    """Raise unless `inserted` computes in eval mode what `source` does, up to rounding.

    Each BatchNorm must add its constant to within 16 roundings, and the outputs' error against
    float64 may be 16 times the source's own, or as many roundings.

    Args:
        source: The model before the insertion.
        inserted: The model with identities in it.
        added: Path of each BatchNorm -> what it must add to its input (None for nothing).
        given: Inputs to compare on.

    Raises:
        InsertError: The outputs moved; the message names the worst site.
    """
    if any(tensor.is_meta for tensor in source.parameters()):
        return  # on the meta device there are no values
    sites = _Sites(added)
    with untouched(inserted), modes_kept(inserted), ExitStack() as stack:
        for path in added:
            handle = inserted.get_submodule(path).register_forward_hook(sites.listener(path))
            stack.callback(handle.remove)
        ours = run(inserted.eval(), given, None)
    before = clone(source).eval()
    with untouched(before):
        own = run(before, given, None)
    truth = _exactly(before, given)
    worst = max(sites.roundings, key=sites.roundings.__getitem__, default="")
    culprit = (
        f"the worst site is {worst!r}, {sites.roundings[worst]:.3g} roundings from an identity"
        if worst
        else "no site was reached"
    )
    moved = _moved(ours, own, own if truth is None else truth)
    if moved or (worst and not sites.roundings[worst] <= _MAX_ROUNDINGS):
        raise InsertError(
            f"inserting identities into {type(source).__name__} moved the eval output "
            f"({moved or 'at a site'}); {culprit}. Exclude that layer, and please report the model"
        )


def _exactly(model: nn.Module, given: Example) -> list[Tensor] | None:
    """The outputs in float64; None where the model's own code forbids it by a fixed dtype."""
    try:
        return run(model.double(), given, torch.float64)
    except Exception:  # noqa: BLE001  # a user's forward raises anything
        return None


def require_reached(model: nn.Module, paths: Sequence[str], given: Example) -> None:
    """Raise InsertError unless `model` runs in eval mode, and through each module of `paths`."""
    reached: set[str] = set()
    with untouched(model), modes_kept(model), ExitStack() as stack:
        for path in paths:
            note = functools.partial(_note, reached, path)
            stack.callback(model.get_submodule(path).register_forward_hook(note).remove)
        try:
            run(model.eval(), given, None)
        except Exception as error:  # a user's forward raises anything
            raise InsertError(
                f"{type(model).__name__} does not run any more with BatchNorm in it: "
                f"{type(error).__name__}: {str(error).partition(chr(10))[0]}. Its code asks "
                "a layer for something that the layer's slot has lost; exclude that layer"
            ) from error
    missed = [path for path in paths if path not in reached]
    if missed:
        raise InsertError(
            f"the forward of {type(model).__name__} goes past the BatchNorm at {missed[0]!r}: it "
            "reads the layer's weights itself, or keeps another reference to the layer; exclude it"
        )


def _note(reached: set[str], path: str, *_: object) -> None:
    reached.add(path)


def agrees(captured: ModuleGraph, given: Example, expected: object) -> bool:
    """Whether a trace gives in eval mode what the model gave, in containers of the same types."""
    args = bound(captured.root, captured.graph, given.copied()).values()
    with modes_kept(captured.root), torch.no_grad(), undisturbed_random_state(captured.root):
        captured.root.eval()
        try:
            ours = fx.Interpreter(captured.root, graph=captured.graph).run(*args)
        except Exception:  # noqa: BLE001  # a trace that took a wrong turn raises anything
            return False
    return alike(ours, expected, nearly)


def run(model: nn.Module, given: Example, dtype: torch.dtype | None) -> list[Tensor]:
    """The floating-point outputs of `model`, its inputs cast to `dtype` if one is given."""

    def cast(leaf: Any) -> Any:
        floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.to(dtype) if floating and dtype is not None else leaf

    mine = given.copied()
    args, kwargs = pytree.tree_map(cast, (mine.args, mine.kwargs))
    with torch.no_grad(), undisturbed_random_state(model):
        return floats(model(*args, **kwargs))


def floats(outputs: Any) -> list[Tensor]:
    """The floating-point tensors in a result, whatever containers or dataclasses hold them."""
    return [t.detach() for t in tensors_in(outputs) if t.is_floating_point() and t.numel()]


def _moved(ours: list[Tensor], own: list[Tensor], truth: list[Tensor]) -> str:
    """How the outputs differ by more than rounding; "" if they do not.

    Their length may depend on the data: on which scores pass a threshold, say, where one rounding
    decides. Such an output is not compared; the sites are.
    """
    if [(t.dim(), t.dtype) for t in ours] != [(t.dim(), t.dtype) for t in own]:
        return "another structure"
    truth = truth if len(truth) == len(own) else own
    for i, (a, b, exact) in enumerate(zip(ours, own, truth, strict=True)):
        if a.shape != b.shape:
            continue
        exact = exact if exact.shape == b.shape else b
        # without a truth to measure the model's own error, allow for a deep network's
        unit = (64 if exact is b else 4) * torch.finfo(b.dtype).eps
        values = [[t.double().cpu().numpy()] for t in (a, b, exact)]
        budget = max(relative_error(values[1], values[2]), unit)
        error = relative_error(values[0], values[2])
        if not error <= _MAX_RATIO * budget:
            return (
                f"output {i} by {error:.3g} relative, where the model itself errs by {budget:.3g}"
            )
    return ""
