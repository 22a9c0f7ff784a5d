"""Shapes of every value in an inference graph, from fake tensors: nothing is computed.

With example inputs they are the example's. Without any they are assumed where a layer fixes rank
and channels: behind a convolution, say, whose input is unknown. What follows from an assumption
holds for inputs of that rank, so the caller guards the rank where nothing else proves it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from bnfx.graphs.examples import has_hooks
from bnfx.graphs.parameters import attribute
from bnfx.graphs.tracing import RANKS
from bnfx.operators.calls import argument
from bnfx.operators.table import Passage, affine_of, is_batch_norm, layer_call, passage_of

#: Sizes to assume along spatial axes, in this order, until all of a network fits.
_SIZES = (224, 32, 28, 64, 8, 96, 128, 256, 299, 384, 512)
_BATCH = 2
_FEW = 8


#: Key of a graph's `meta`: parameters that are kept in float64 until the end, and their dtypes.
EXACT = "bnfx_exact"


#: node.meta key: what a module that is kept whole returned on the example, as meta tensors.
SEEN = "bnfx_seen"


class Unknown:
    """A value of which nothing is known."""


UNKNOWN = Unknown()


@dataclass(eq=False)
class Shapes:
    """Fake values by node, and the nodes whose shape was assumed."""

    #: Fake tensors and plain numbers; UNKNOWN where a call failed or was not made.
    values: dict[fx.Node, Any] = field(default_factory=dict)
    #: Node -> rank that was assumed for it.
    assumed: dict[fx.Node, int] = field(default_factory=dict)
    #: Nodes that could not be run though their inputs were known.
    failures: list[fx.Node] = field(default_factory=list)
    #: Whether one of them failed for the rank of its input, whatever its sizes.
    impossible: bool = False


def shapes_of(
    module: fx.GraphModule,
    inputs: Sequence[Any] | None,
    others: Sequence[Sequence[Any]] | None = None,
) -> list[Shapes]:
    """Shapes for the example, or assumed ones, and for a second set of sizes where that runs.

    What is true for two sizes of batch and image, and read from one graph, is taken to be true for
    the others that the graph accepts.

    Args:
        module: The inference graph.
        inputs: One value for each placeholder; None without an example.
        others: The same for other sizes, of which the first that runs is taken; None to try the
            example with a larger batch and image.
    """
    runner = _Runner(module)
    if inputs is not None:
        first = runner.run(inputs, _BATCH, 0)
        runner.first = False
        if others is None:
            others = [_resized(inputs, *more) for more in ((1, 32), (1, 0), (0, 32))]
        runs = (runner.run(other, _BATCH, 0) for other in others)
        second = next((run for run in runs if len(run.failures) <= len(first.failures)), None)
        return [first, second] if second is not None else [first]
    return _assumed(runner)


def _assumed(runner: _Runner) -> list[Shapes]:
    tried: list[Shapes] = []
    for size in _SIZES:
        tried.append(runner.run(None, _BATCH, size))
        if not tried[-1].failures:
            break
    first = min(tried, key=lambda run: len(run.failures))
    if first.failures and len(first.assumed) <= _FEW:  # perhaps not the sizes, but a rank is wrong
        size = _SIZES[tried.index(first)]
        for node in first.assumed:
            runner.shifts = {node: 1}
            other = runner.run(None, _BATCH, size)
            if len(other.failures) < len(first.failures):
                larger = runner.run(None, _BATCH + 1, size)
                return [other, larger] if not larger.failures else [other]
        runner.shifts = {}
    size = _SIZES[tried.index(first)]
    for batch, space in ((_BATCH + 1, size + 32), (_BATCH + 1, size)):
        second = runner.run(None, batch, space)
        if len(second.failures) <= len(first.failures):
            return [first, second]
    return [first]


def at_other_ranks(module: fx.GraphModule, runs: Sequence[Shapes], node: fx.Node) -> list[Shapes]:
    """Shapes with another rank assumed for `node`, one run for each rank that the graph takes.

    Empty where it is not certain that the graph refuses the ranks that are left out.
    """
    first = runs[0]
    size = next((int(v.shape[-1]) for v in map(first.values.get, first.assumed) if is_tensor(v)), 8)
    runner = _Runner(module)
    found = []
    for change in (-1, 0, 1, 2):
        runner.shifts = {node: change}
        run = runner.run(None, _BATCH, size)
        if run.assumed.get(node) == first.assumed[node] or run.impossible:
            continue
        if run.failures:
            return []
        found.append(run)
    return found


def _resized(inputs: Sequence[Any], batch: int, space: int) -> list[Any]:
    """The example with `batch` more rows, and `space` more along the axes behind the channels."""

    def resize(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim():
            return leaf
        shape = [leaf.shape[0] + batch, *leaf.shape[1:2], *(n + space for n in leaf.shape[2:])]
        return torch.empty(shape, dtype=leaf.dtype, device="meta")

    return pytree.tree_map(resize, list(inputs))  # type: ignore[no-any-return]  # pytree is untyped


@contextmanager
def _silent() -> Iterator[None]:
    """A call that does not fit is an answer here; torch would log it as an error."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


class _Runner:
    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.modules = dict(module.named_modules(remove_duplicate=False))
        self.fixed: dict[str, Any] = {}
        self.shifts: dict[fx.Node, int] = {}
        self.first = True

    def run(self, inputs: Sequence[Any] | None, batch: int, size: int) -> Shapes:
        found = Shapes()
        given = iter(inputs or ())
        with torch.no_grad(), _silent(), self.mode:
            for node in self.module.graph.nodes:
                if node.op == "placeholder":
                    value = pytree.tree_map(self._fake, next(given)) if inputs else UNKNOWN
                    found.values[node] = self._assumed_input(node, batch, size, found, value)
                elif node.op == "get_attr":
                    found.values[node] = self._attribute(str(node.target))
                elif node.op != "output":
                    found.values[node] = self._call(node, batch, size, found)
        return found

    def _fake(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.device.type == "meta":
            return torch.empty(leaf.shape, dtype=leaf.dtype, device="cpu")
        return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)

    def _attribute(self, name: str) -> Any:
        if name not in self.fixed:
            value = pytree.tree_map(self._fake, attribute(self.module, name))
            dtype = self.module.meta.get(EXACT, {}).get(name)
            self.fixed[name] = value if dtype is None else torch.empty_like(value, dtype=dtype)
        return self.fixed[name]

    def _assumed_input(
        self, node: fx.Node, batch: int, size: int, found: Shapes, value: Any
    ) -> Any:
        """An input that a convolution reads first has its rank and channels from there."""
        if value is not UNKNOWN:
            return value
        for user in node.users:
            row = affine_of(user)
            if row is None or row.spatial is None:
                continue
            call = layer_call(user)
            weight = self._weight(call["weight"], found)
            if weight is None or call["input"] is not node:
                continue
            channels = weight.shape[0 if row.transposed else 1] * (
                1 if row.transposed else int(call["groups"])
            )
            rank = row.spatial + 2 + self.shifts.get(node, 0)
            if rank not in (row.spatial + 1, row.spatial + 2):
                found.failures.append(node)
                found.impossible = True
                return UNKNOWN
            found.assumed[node] = rank
            shape = [batch, channels, *[size] * row.spatial]
            return torch.empty(
                shape[row.spatial + 2 - rank :], dtype=weight.dtype, device=weight.device
            )
        return UNKNOWN

    def _weight(self, node: object, found: Shapes) -> Tensor | None:
        """What a layer reads beside its input; a view of a parameter, say."""
        value = None
        if isinstance(node, fx.Node):
            named = node.op == "get_attr"  # it may stand behind the input that needs it
            value = self._attribute(str(node.target)) if named else found.values.get(node)
        return value if isinstance(value, Tensor) else None

    def _call(self, node: fx.Node, batch: int, size: int, found: Shapes) -> Any:
        seen = [found.values.get(n, UNKNOWN) for n in node.all_input_nodes]
        reads = passage_of(node) is Passage.SHAPE
        if any(value is UNKNOWN for value in seen):
            return UNKNOWN if reads else self._assume(node, batch, size, found)
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: found.values[n])
        try:
            return self._run(node, args, kwargs)
        except Exception as error:  # noqa: BLE001  # an operator on fake values raises anything
            found.failures.append(node)
            found.impossible |= isinstance(error, IndexError)
            return self._assume(node, batch, size, found)

    def _run(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node.op == "call_function":
            if node.target in (torch._assert, torch._check):
                return None
            ranks = node.meta.get(RANKS)
            if ranks and args[0].dim() not in ranks:
                raise IndexError(f"{node.name} takes no tensor of rank {args[0].dim()}")
            return node.target(*args, **kwargs)  # type: ignore[operator]  # a function
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        module = self.modules[str(node.target)]
        if SEEN in node.meta:
            if not self.first:
                raise ValueError(f"{node.name} was seen at the sizes of the example only")
            return pytree.tree_map(self._fake, node.meta[SEEN])
        if any(has_hooks(inner) for inner in module.modules()) or not _is_stock(module):
            return UNKNOWN
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        fakes = {name: self._fake(tensor) for name, tensor in state.items()}
        return torch.func.functional_call(module, fakes, args, kwargs)

    def _assume(self, node: fx.Node, batch: int, size: int, found: Shapes) -> Any:
        row = affine_of(node)
        space = max(size, 32)
        if row is not None:
            call = layer_call(node)
            weight = self._weight(call["weight"], found)
            if weight is None:
                return UNKNOWN
            grouped = int(call["groups"]) if row.transposed else 1
            channels = weight.shape[1] * grouped if row.transposed else weight.shape[0]
            shift = self.shifts.get(node, 0)
            sizes = (batch, channels, *[space] * (row.spatial or 0))
            if row.spatial is None:
                sizes = (*[batch] * (1 + shift), channels)
            elif shift == -1:
                sizes = sizes[1:]
            elif shift:
                found.failures.append(node)
                found.impossible = True
            found.assumed[node] = len(sizes)
            return torch.empty(sizes, dtype=weight.dtype, device=weight.device)
        ranks = node.meta.get(RANKS, frozenset())
        if is_batch_norm(node) and ranks:
            mean = self._weight(argument(node, 1, "running_mean"), found)
            if mean is None:
                return UNKNOWN
            found.assumed[node] = rank = min(ranks) + self.shifts.get(node, 0)
            if rank not in ranks:
                found.failures.append(node)
                found.impossible = True
                return UNKNOWN
            return torch.empty(
                batch, mean.shape[0], *[space] * (rank - 2), dtype=mean.dtype, device=mean.device
            )
        return UNKNOWN


def _is_stock(module: nn.Module) -> bool:
    return all(type(inner).__module__.startswith("torch.nn.") for inner in module.modules())


def is_tensor(value: Any) -> TypeGuard[Tensor]:
    """Whether a fake value is a tensor."""
    return isinstance(value, FakeTensor | Tensor)
