"""Shapes of every value in an inference graph, from fake tensors: nothing is computed.

With example inputs they are the example's. Without any they are assumed where a layer fixes rank
and channels: behind a convolution, say, whose input is unknown. What follows from an assumption
holds for inputs of that rank, so the caller guards the rank where nothing else proves it.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from bnfx.graphs.examples import has_hooks
from bnfx.graphs.parameters import attribute
from bnfx.graphs.tracing import RANKS
from bnfx.operators.calls import argument, base_name, call_name
from bnfx.operators.products import products
from bnfx.operators.table import (
    Passage,
    Role,
    affine_of,
    is_batch_norm,
    layer_call,
    passage_of,
    product_of,
    role_of,
)

#: Sizes to assume along spatial axes, in this order, until all of a network fits.
_SIZES = (224, 32, 28, 64, 8, 96, 128, 256, 299, 384, 512)
_BATCH = 2
_FEW = 8


#: Calls that keep the rank of what they read, and its channels.
_SAME_RANK = (
    Passage.IDENTITY,
    Passage.RECTIFIER,
    Passage.CLAMP,
    Passage.SOFTMAX,
    Passage.MAX_POOL,
    Passage.AVERAGE_POOL,
    Passage.INTERPOLATE,
    Passage.PAD,
)
#: Calls that do so with values of one rank.
_OF_TWO = (
    Passage.ADD,
    Passage.SUBTRACT,
    Passage.NEGATE,
    Passage.MULTIPLY,
    Passage.DIVIDE,
    Passage.EXTREMUM,
)

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
    #: Node -> by how much that is another rank than the usual one.
    shifts: dict[fx.Node, int] = field(default_factory=dict)
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
    size = _SIZES[tried.index(first)]
    while first.failures:  # perhaps not the sizes, but a rank is wrong
        better = None
        for node in itertools.islice(first.assumed, _FEW):
            runner.shifts = first.shifts | {node: first.shifts.get(node, 0) + 1}
            other = runner.run(None, _BATCH, size)
            if len(other.failures) < len((better or first).failures):
                better = other
        if better is None:
            break
        first = better
    runner.shifts = first.shifts
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
        runner.shifts = first.shifts | {node: change}
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


#: Ranks that a linear layer takes.
_ANY = frozenset(range(1, 9))


@dataclass(frozen=True)
class _Layer:
    """What fixes ranks and channels where nothing else does."""

    #: The ranks that it takes, and the one to assume.
    ranks: frozenset[int]
    usual: int
    #: How many axes lie behind the channels; None for all behind the first two.
    spatial: int | None
    inputs: int
    outputs: int
    #: A tensor like what it takes.
    like: Tensor
    #: What it reads.
    reads: fx.Node


class _Runner:
    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.modules = dict(module.named_modules(remove_duplicate=False))
        self.fixed: dict[str, Any] = {}
        self.shifts: dict[fx.Node, int] = {}
        self.first = True
        self._readers = _first_layers(module.graph)

    def run(self, inputs: Sequence[Any] | None, batch: int, size: int) -> Shapes:
        found = Shapes(shifts=self.shifts)
        given = iter(inputs or ())
        with torch.no_grad(), _silent(), self.mode:
            for node in self.module.graph.nodes:
                if node.op == "placeholder":
                    value = pytree.tree_map(self._fake, next(given)) if inputs else UNKNOWN
                    known = value is not UNKNOWN
                    found.values[node] = value if known else self._source(node, batch, size, found)
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

    def _source(self, node: fx.Node, batch: int, size: int, found: Shapes) -> Any:
        """What nothing else tells has the rank and channels that the first layers behind it take.

        All these must agree: ranks assumed one by one would exclude each other.
        """
        behind = [layer for n in self._readers.get(node, ()) if (layer := self._layer(n, found))]
        if not behind:
            return UNKNOWN
        first = min(behind, key=lambda layer: layer.spatial is None)  # a convolution, if any
        fits = frozenset.intersection(*(layer.ranks for layer in behind))
        return self._assumed(node, replace(first, ranks=fits), first.inputs, (batch, size), found)

    def _assume(self, node: fx.Node, batch: int, size: int, found: Shapes) -> Any:
        layer = self._layer(node, found)
        if layer is None:
            return UNKNOWN
        read = found.values.get(layer.reads)
        if is_tensor(read) and read.dim() in layer.ranks:  # it is the sizes that do not fit
            spatial = read.dim() - 2 if layer.spatial is None else layer.spatial
            shape = list(read.shape)
            shape[read.dim() - 1 - spatial] = layer.outputs
            return read.new_empty(shape)
        if layer.ranks is _ANY and self._readers.get(node):
            made = self._source(node, batch, size, found)
            return made.new_empty(*made.shape[:-1], layer.outputs) if is_tensor(made) else made
        return self._assumed(node, layer, layer.outputs, (batch, max(size, 32)), found)

    def _assumed(
        self, node: fx.Node, layer: _Layer, channels: int, sizes: tuple[int, int], found: Shapes
    ) -> Any:
        """A value of `layer`'s usual rank, or of that with the shift which is tried."""
        rank = layer.usual + self.shifts.get(node, 0)
        if rank not in layer.ranks:
            found.failures.append(node)
            found.impossible = True
            return UNKNOWN
        found.assumed[node] = rank
        batch, size = sizes
        spatial = rank - 2 if layer.spatial is None else layer.spatial
        shape = [*[batch] * (rank - 1 - spatial), channels, *[size] * spatial]
        return torch.empty(shape, dtype=layer.like.dtype, device=layer.like.device)

    def _layer(self, node: fx.Node, found: Shapes) -> _Layer | None:
        """What a layer, a BatchNorm or a product with a matrix says of what it reads and gives."""
        row, ranks = affine_of(node), node.meta.get(RANKS)
        if row is not None:
            call = layer_call(node)
            weight = self._weight(call["weight"], found)
            if weight is None or weight.dim() < 2:
                return None
            if row.spatial is None:
                sizes = (weight.shape[1], weight.shape[0])
                return _Layer(_ANY, 2, 0, *sizes, weight, call["input"])
            into, out = weight.shape[1] * int(call["groups"]), weight.shape[0]
            sizes = (out, into) if row.transposed else (into, out)
            usual = row.spatial + 2
            fits = frozenset({usual - 1, usual})
            return _Layer(fits, usual, row.spatial, *sizes, weight, call["input"])
        if is_batch_norm(node) and ranks:
            mean = self._weight(argument(node, 1, "running_mean"), found)
            if mean is None:
                return None
            sizes = (mean.shape[0], mean.shape[0])
            return _Layer(ranks, min(ranks), None, *sizes, mean, argument(node, 0, "input"))
        name = base_name(call_name(node))
        for product in products(node) if product_of(node) and name != "einsum" else ():
            weight = self._weight(product.weight, found)
            if product.y_axes == (-1,) and weight is not None and weight.dim() == 2:
                fits = _ANY if "matmul" in name else frozenset({2})
                into, out = weight.shape
                return _Layer(fits, 2, 0, into, out, weight, product.input)
        return None

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
            value = UNKNOWN if reads else self._assume(node, batch, size, found)
            return self._source(node, batch, size, found) if value is UNKNOWN else value
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


def keeps_rank(node: fx.Node) -> bool:
    """Whether what a call gives has the rank of what it reads."""
    if passage_of(node) in _SAME_RANK or is_batch_norm(node):
        return True
    return (
        node.op != "call_module"
        and role_of(node, {}) in (Role.NONLINEARITY, Role.SQUASHING)
        and len(node.all_input_nodes) == 1
    )


def _first_layers(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Each value -> the convolutions and BatchNorms that read it, or it after such calls alone."""
    of: dict[fx.Node, fx.Node] = {}
    free: set[fx.Node] = set()
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "get_attr" or (inputs and free.issuperset(inputs)):
            free.add(node)
            continue
        sources = {of[n] for n in inputs if n not in free}
        row = affine_of(node)
        layer = is_batch_norm(node) or (row is not None and row.spatial is not None)
        if layer and len(sources) == 1:
            found.setdefault(next(iter(sources)), []).append(node)
        same = keeps_rank(node) or passage_of(node) in _OF_TWO
        whole = row is None and base_name(call_name(node)) != "glu"  # which halves the channels
        of[node] = next(iter(sources)) if len(sources) == 1 and same and whole else node
    return found


def _is_stock(module: nn.Module) -> bool:
    return all(type(inner).__module__.startswith("torch.nn.") for inner in module.modules())


def is_tensor(value: Any) -> TypeGuard[Tensor]:
    """Whether a fake value is a tensor."""
    return isinstance(value, FakeTensor | Tensor)
