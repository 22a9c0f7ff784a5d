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
from bnfx.graphs.examples import Example, clone, modes_kept, skeleton, untouched
from bnfx.graphs.examples import twins as twins_of
from bnfx.graphs.observed import tensors_in, undisturbed_random_state
from bnfx.graphs.training import ModuleGraph
from bnfx.numbers import Array, relative_error

_Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]

#: Values that are compared in float64 at once: bounds the memory that it takes.
_CHUNK = 1 << 17
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

    def listener(self, path: str) -> _Hook:
        def listen(norm: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            assert isinstance(norm, _BatchNorm)
            bias, mean = self.added[path], norm.running_mean
            assert mean is not None
            parts = [args[0].transpose(0, 1), out.transpose(0, 1)]
            parts += [torch.zeros_like(mean) if bias is None else bias, mean]
            step = max(1, _CHUNK * len(mean) // max(1, out.numel()))
            slabs = zip(*(part.split(step) for part in parts), strict=True)
            apart = max((_apart(*slab) for slab in slabs), default=0.0)
            apart /= torch.finfo(out.dtype).eps
            self.roundings[path] = max(self.roundings.get(path, 0.0), apart)

        return listen


def _apart(x: Tensor, y: Tensor, added: Tensor, mean: Tensor) -> float:
    """How far y is from x + added at most, relative to the terms of a BatchNorm with that mean.

    Channels come first. What is no number is left to the comparison of the outputs.
    """
    shape = (-1, *[1] * (x.dim() - 1))
    x, added, mean = x.double(), added.double().reshape(shape), mean.double().reshape(shape)
    terms = x.abs().add_(mean.abs() + added.abs()).clamp_min_(1e-300)
    apart = (x + added).sub_(y).abs_().div_(terms).nan_to_num_(nan=0.0)
    return float(apart.max()) if apart.numel() else 0.0


def require_same_outputs(
    source: nn.Module,
    inserted: nn.Module,
    added: Mapping[str, Tensor | None],
    given: Example,
    *,
    reached: Sequence[str] = (),
    twins: Mapping[Tensor, Tensor] | None = None,
) -> None:
    """Raise unless `inserted` computes in eval mode what `source` does, up to rounding.

    Each BatchNorm must add its constant to within 16 roundings, and the outputs' error against
    float64 may be 16 times the source's own, or as many roundings.

    Args:
        source: The model before the insertion.
        inserted: The model with identities in it.
        added: Path of each BatchNorm -> what it must add to its input (None for nothing).
        given: Inputs to compare on.
        reached: Paths of modules that must run.
        twins: For parameters of `inserted`, those of `source` with the same values.

    Raises:
        InsertError: The outputs moved; the message names the worst site.
    """
    if any(tensor.is_meta for tensor in source.parameters()):  # where there are no values
        require_reached(inserted, reached, given, twins)
        return
    sites = _Sites(added)
    listeners = {path: sites.listener(path) for path in added}
    ours = require_reached(inserted, reached, given, twins, listeners)
    before = skeleton(source).eval()
    with untouched(before, twins_of(inserted, before)):
        own = run(before, given, None)
    worst = max(sites.roundings, key=sites.roundings.__getitem__, default="")
    culprit = (
        f"the worst site is {worst!r}, {sites.roundings[worst]:.3g} roundings from an identity"
        if worst
        else "no site was reached"
    )
    moved = "" if _near(ours, own) else _moved(ours, own, _exactly(source, given) or own)
    if moved or (worst and not sites.roundings[worst] <= _MAX_ROUNDINGS):
        raise InsertError(
            f"inserting identities into {type(source).__name__} moved the eval output "
            f"({moved or 'at a site'}); {culprit}. Exclude that layer, and please report the model"
        )


def _near(ours: Sequence[Tensor], own: Sequence[Tensor]) -> bool:
    """Whether outputs are so near to each other that `_moved` says nothing, whatever the truth is.

    |ours - truth| <= |ours - own| + |own - truth|, and the budget is at least 4 units.
    """
    return [(t.shape, t.dtype) for t in ours] == [(t.shape, t.dtype) for t in own] and all(
        relative_error([_wide(a)], [_wide(b)]) <= 3 * _MAX_RATIO * torch.finfo(b.dtype).eps
        for a, b in zip(ours, own, strict=True)
    )


def _wide(tensor: Tensor) -> Array:
    wide: Array = tensor.double().cpu().numpy()
    return wide


def _exactly(model: nn.Module, given: Example) -> list[Tensor] | None:
    """The outputs in float64; None where the model's own code forbids it by a fixed dtype."""
    try:
        return run(clone(model).eval().double(), given, torch.float64)
    except Exception:  # noqa: BLE001  # a user's forward raises anything
        return None


def require_reached(
    model: nn.Module,
    paths: Sequence[str],
    given: Example,
    twins: Mapping[Tensor, Tensor] | None = None,
    listeners: Mapping[str, _Hook] | None = None,
) -> list[Tensor]:
    """What `model` gives in eval mode.

    Args:
        model: The model with BatchNorms in it.
        paths: Modules that must run.
        given: Its inputs.
        twins: For parameters of `model`, others with the same values.
        listeners: Hooks of modules by their paths.

    Raises:
        InsertError: It does not run, or not through all of `paths`.
    """
    reached: set[str] = set()
    hooks: list[tuple[str, _Hook]] = [*(listeners or {}).items()]
    hooks += [(path, functools.partial(_note, reached, path)) for path in paths]
    with untouched(model, twins), modes_kept(model), ExitStack() as stack:
        for path, hook in hooks:
            stack.callback(model.get_submodule(path).register_forward_hook(hook).remove)
        try:
            out = run(model.eval(), given, None)
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
    return out


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
        values = [[_wide(t)] for t in (a, b, exact)]
        budget = max(relative_error(values[1], values[2]), unit)
        error = relative_error(values[0], values[2])
        if not error <= _MAX_RATIO * budget:
            return (
                f"output {i} by {error:.3g} relative, where the model itself errs by {budget:.3g}"
            )
    return ""
