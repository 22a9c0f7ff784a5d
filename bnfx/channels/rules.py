"""How channels pass through operators: one rule for each passage of the operator table.

A rule gives the units and the bits of what a call returns, and says through `demand` which units
only go together. An operator without a rule, and a call that does not fit its rule, needs all that
it reads, whole: softmax, a norm over channels, a product of two computed matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from bnfx.channels.look import Layer, Look, bits_of, unknown_map
from bnfx.gauges import rules_axes, rules_elements
from bnfx.gauges.constraints import Cause, Constraints, Demand
from bnfx.gauges.labels import along, array, compact, settled
from bnfx.gauges.rules_layers import pads_with_zeros
from bnfx.gauges.walk import FoldOptions, Opaque, Walk
from bnfx.graphs.constants import Values
from bnfx.graphs.naming import describe
from bnfx.graphs.norms import affine_map_of
from bnfx.graphs.shapes import UNKNOWN, Shapes, is_tensor
from bnfx.numbers import Floats
from bnfx.operators.calls import argument, base_name, call_name, words
from bnfx.operators.table import Passage, affine_of, layer_call, passage_of, reads_elements

Rule = Callable[[Look, fx.Node], tuple[Any, Any]]

#: Functions of one element, finite where it is; f(0) need not be 0.
POINTWISE = words(
    "relu leaky_relu relu6 hardtanh clamp clip clamp_min clamp_max elu selu celu gelu silu mish "
    "hardswish sigmoid expit logsigmoid log_sigmoid tanh hardsigmoid softsign softplus erf sin cos "
    "abs absolute square softshrink hardshrink tanhshrink neg negative threshold _threshold"
)
#: Functions with a slope for each channel.
SLOPES = words("prelu _prelu_kernel")
#: They need all that they read, and what they give is finite.
_TAME = (Passage.SOFTMAX, Passage.NORM, Passage.MATMUL)


def look(
    graph: fx.Graph,
    shapes: Shapes,
    values: Values,
    found: Constraints,
    barred: Mapping[fx.Node, str],
    reads: dict[fx.Node, Tensor],
) -> Look:
    """Visit every node in order; what must go together is in `found` then."""
    options = FoldOptions()
    seen = Look(
        Walk(graph, shapes, values, found, barred, options),
        Walk(graph, shapes, values, Constraints(), barred, options),
        reads,
    )
    for node in graph.nodes:
        reading = [n for n in node.all_input_nodes if reads_elements(node, n)]
        if node.op == "placeholder" or any(n in seen.units.data for n in reading):
            seen.units.data.add(node)
        if node.op == "output":
            seen.units.ground_inputs(node, "graph output")
            continue
        seen.units.maps[node], seen.bits.maps[node] = _visit(seen, node)
        if node in barred:
            seen.bits.maps[node] = seen.unknown(node)
            for leaf in pytree.tree_leaves(seen.units.maps[node]):
                if isinstance(leaf, Tensor):
                    found.ground(array(leaf), Cause(node, barred[node]))
    return seen


def _visit(seen: Look, node: fx.Node) -> tuple[Any, Any]:
    ground, unknown = seen.units.grounded(node), seen.unknown(node)
    if node.op in ("placeholder", "get_attr") or seen.values.is_constant(node):
        return ground, unknown
    passage, found = passage_of(node), seen.units.found
    before = len(found.batches)
    try:
        if node not in seen.units.data:
            raise Opaque
        rule = _rule(seen, node, passage)
        _fill(seen, node, passage)
        done = rule(seen, node)
    except Opaque:
        del found.batches[before:]
        seen.layers.pop(node, None)
        if not (passage is Passage.SHAPE and not is_tensor(seen.shapes.values.get(node))):
            seen.units.ground_inputs(node, describe(node))
        tame = passage in _TAME and seen.loose.isdisjoint(node.all_input_nodes)
        leaves = pytree.tree_leaves(seen.shapes.values.get(node))
        if not tame and any(is_tensor(leaf) for leaf in leaves):
            seen.loose.add(node)
        return ground, unknown
    if not seen.loose.isdisjoint(node.all_input_nodes):
        seen.loose.add(node)
    return done


def _rule(seen: Look, node: fx.Node, passage: Passage | None) -> Rule:
    if any(seen.shapes.values.get(n) is UNKNOWN for n in (node, *node.all_input_nodes)):
        raise Opaque
    name = base_name(call_name(node))
    if node.op in ("call_function", "call_method") and passage is not Passage.MATMUL:
        if name in POINTWISE:
            return pointwise
        if name in SLOPES:
            return prelu
        if name == "glu":
            return glu
    if passage not in _RULES:
        raise Opaque
    return _RULES[passage]


def _fill(seen: Look, node: fx.Node, passage: Passage | None) -> None:
    """Let the constants that a call reads have their bits."""
    if passage in (Passage.AFFINE, Passage.BATCH_NORM):
        return
    for n in node.all_input_nodes:
        known = seen.values.operand(n) if n not in seen.units.data else None
        if known is not None:
            seen.bits.maps[n] = bits_of(known, known.shape)
            if not bool(torch.isfinite(known).all()):
                seen.loose.add(n)


def affine(seen: Look, node: fx.Node) -> tuple[Tensor, Tensor]:
    """New units, tied to those that are read where each group reads one channel."""
    row, call, shape = affine_of(node), layer_call(node), seen.shape_of(node)
    assert row is not None
    weight, bias = seen.values.of(call["weight"]), seen.values.of(call["bias"])
    if weight is None or (call["bias"] is not None and bias is None) or weight.is_meta:
        raise Opaque
    if not weight.is_floating_point() or weight.dim() != 2 + (row.spatial or 0):
        raise Opaque
    for part in (call["weight"], call["bias"]):
        if isinstance(part, fx.Node) and not _alone(seen, part):
            raise Opaque
    if not _stored(seen, call["weight"], weight):
        raise Opaque
    blocks = blocks_of(weight.detach(), row.transposed, int(call["groups"]))
    if node not in seen.reads:
        seen.reads[node] = (blocks != 0).unsqueeze(-1).flatten(3).any(3).cpu()
    reads = seen.reads[node]
    groups, outs, ins = reads.shape
    axis = len(shape) - 1 - (row.spatial or 0)
    if bias is not None and bias.shape != (groups * outs,):
        raise Opaque
    cause = Cause(node, describe(node))
    x = seen.units.channels(seen.units.labels_of(call["input"]), axis, cause)
    known = seen.numbers(call["input"], axis)
    if len(x) != groups * ins or shape[axis] != groups * outs:
        raise Opaque
    y = seen.units.found.fresh(node, "y", groups * outs)
    if ins == 1 and groups > 1:
        seen.units.found.demand(Demand.SAME, y, np.repeat(x, outs), cause=cause)
    if not bool(torch.isfinite(weight).all()) or not (bias is None or bias.isfinite().all()):
        raise Opaque
    even, finite = not pads_with_zeros(row, call, weight), call["input"] not in seen.loose
    gives = _outputs(blocks, bias, known, reads, even=even, finite=finite)
    seen.layers[node] = Layer(
        node=node,
        row=row,
        x=x,
        y=y,
        gives=gives,
        reads=reads,
        known=known,
        even=even,
        finite=finite,
    )
    return along(y, axis, shape), settled(along(gives.view(np.int64), axis, shape))


def blocks_of(weight: Tensor, transposed: bool, groups: int) -> Tensor:  # noqa: FBT001  # of a row
    """A weight as (groups, out / groups, in / groups, *kernel)."""
    blocks = weight.reshape(groups, -1, *weight.shape[1:])
    return blocks.transpose(1, 2) if transposed else blocks


def _alone(seen: Look, part: fx.Node) -> bool:
    """Whether one call reads a parameter."""
    if len(part.users) != 1:
        return False
    return part.op != "get_attr" or len(seen.values.known.readers[str(part.target)]) == 1


def _outputs(
    blocks: Tensor, bias: Tensor | None, known: Floats, reads: Tensor, *, even: bool, finite: bool
) -> Floats:
    """What each output channel always is: its bias, where it reads constants or nothing."""
    groups, outs, ins = reads.shape
    c = torch.from_numpy(known).reshape(groups, 1, ins)
    steady = (c == 0) | (torch.isfinite(c) & even)
    fixed = (steady | (~reads & finite)).all(2)
    out = torch.full((groups, outs), torch.nan, dtype=torch.float64, device="cpu")
    for g, o in fixed.nonzero().tolist():
        taps = blocks[g, o].detach().cpu().double().reshape(ins, -1).sum(1)
        out[g, o] = (taps * torch.nan_to_num(c[g, 0])).sum()
    flat = out.reshape(-1)
    if bias is not None:
        flat = flat + bias.detach().cpu().double()
    return np.asarray(_finite(flat).numpy())


def _finite(values: Tensor) -> Tensor:
    return torch.where(torch.isfinite(values), values, torch.nan) + 0.0


def batch_norm(seen: Look, node: fx.Node) -> tuple[Tensor, Tensor]:
    """The same units; t where s is 0."""
    known, shape = affine_map_of(node, seen.values), seen.shape_of(node)
    source = argument(node, 0, "input")
    if isinstance(known, str) or len(shape) < 2 or shape[1] != len(known.s):
        raise Opaque
    x = seen.units.channels(seen.units.labels_of(source), 1, Cause(node, describe(node)))
    c = seen.numbers(source, 1)
    if len(x) != len(known.s):
        raise Opaque
    out = known.s * c + known.t
    if source not in seen.loose:
        out = np.where(known.s == 0, known.t, out)
    return along(x, 1, shape), bits_of(torch.from_numpy(out).reshape(_view(shape, 1)), shape)


def _view(shape: Sequence[int], axis: int) -> list[int]:
    return [n if i == axis else 1 for i, n in enumerate(shape)]


def pointwise(seen: Look, node: fx.Node) -> tuple[Tensor, Tensor]:
    """The same units, and the function of what is known."""
    source = argument(node, 0, "input")
    if node.all_input_nodes != [source]:
        raise Opaque
    labels, known = seen.units.labels_of(source), seen.number(source)
    return labels, bits_of(evaluated(node, {source: known}), seen.shape_of(node))


def evaluated(node: fx.Node, operands: Mapping[fx.Node, Tensor]) -> Tensor:
    """The call on float64 numbers; NaN where an operand is NaN, whatever the function says."""
    fixed = {n: torch.nan_to_num(value) for n, value in operands.items()}
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: fixed[n])
    out: Tensor = rules_elements.called(node, args, kwargs)
    for value in operands.values():
        out = torch.where(torch.isnan(value), torch.nan, out)
    return out


def prelu(seen: Look, node: fx.Node) -> tuple[Tensor, Tensor]:
    """The same units; slopes go with their channels."""
    source, slopes = argument(node, 0, "input"), argument(node, 1, "weight")
    labels, shape = seen.units.labels_of(source), seen.shape_of(node)
    known = seen.values.operand(slopes)
    if known is None or (known.numel() > 1 and (known.dim() != 1 or len(shape) < 2)):
        raise Opaque
    slope = known.reshape(_view(shape, 1)) if known.numel() > 1 else known.reshape(())
    c = seen.number(source)
    return labels, bits_of(torch.where(c < 0, c * slope, c), shape)


def glu(seen: Look, node: fx.Node) -> tuple[Tensor, Tensor]:
    """x1 sigmoid(x2) for the halves of x: their units are the same."""
    source, axis = argument(node, 0, "input"), argument(node, 1, "dim", -1)
    halves = seen.units.labels_of(source).chunk(2, axis)
    _tie(seen, node, *halves)
    first, second = (
        m.contiguous().view(torch.float64) for m in seen.bits.maps[source].chunk(2, axis)
    )
    out = torch.where(first == 0, first, first * torch.sigmoid(second))
    if source in seen.loose:
        out = torch.full_like(out, torch.nan)
    return settled(halves[0]), settled(bits_of(out, out.shape))


def _tie(seen: Look, node: fx.Node, first: Tensor, second: Tensor) -> None:
    one, two = torch.broadcast_tensors(compact(first), compact(second))
    pairs = (np.ascontiguousarray(labels.reshape(-1).numpy()) for labels in (one, two))
    seen.units.found.demand(Demand.SAME, *pairs, cause=Cause(node, describe(node)))


def combined(seen: Look, node: fx.Node) -> tuple[Tensor, Tensor]:
    """Sums, products and extrema: operands of one shape have the same units."""
    passage, shape = passage_of(node), seen.shape_of(node)
    operands = [argument(node, 0, "input"), argument(node, 1, "other")]
    nodes = [n for n in operands if isinstance(n, fx.Node)]
    if set(nodes) != set(node.all_input_nodes):
        raise Opaque
    if passage is Passage.DIVIDE and not _divides(seen, operands):
        raise Opaque
    known = {n: _aligned(seen.number(n), len(shape)) for n in nodes}
    out = evaluated(node, known)
    if passage is Passage.MULTIPLY:
        for one, other in (operands, operands[::-1]):
            tame = other not in seen.loose if isinstance(other, fx.Node) else math.isfinite(other)
            if isinstance(one, fx.Node) and tame:
                out = torch.where(known[one] == 0, 0.0, out)
    data = [n for n in nodes if n in seen.units.data]
    maps = [_aligned(compact(settled(seen.units.labels_of(n))), len(shape)) for n in data]
    _check_constants(seen, [n for n in nodes if n not in data])
    if len(data) == 2:
        maps = _tied(seen, node, data, maps)
    units = maps[0] if len(maps) == 1 else torch.broadcast_tensors(*maps)[0]
    return settled(units.expand(shape)), bits_of(out, shape)


def _divides(seen: Look, operands: Sequence[object]) -> bool:
    """Whether the divisor is a constant without a zero."""
    known = seen.values.operand(operands[1])
    return known is not None and bool((known != 0).all())


def _check_constants(seen: Look, constants: Sequence[fx.Node]) -> None:
    """Constants must be stored, so that some of their channels can be stored without the rest."""
    for n in constants:
        value = seen.values.of(n)
        if value is None or (value.numel() > 1 and not _stored(seen, n, value)):
            raise Opaque


def _stored(seen: Look, node: fx.Node, value: Tensor) -> bool:
    """Whether a constant is computed from a parameter of its own floating dtype, or is one."""
    sources = seen.values.sources(node)
    same = bool(sources) and seen.values.known.tensors[sources[0]].dtype is value.dtype
    return same and value.is_floating_point()


def _aligned(values: Tensor, rank: int) -> Tensor:
    if values.dim() > rank:
        raise Opaque
    return values.reshape([1] * (rank - values.dim()) + list(values.shape))


def _tied(
    seen: Look, node: fx.Node, data: Sequence[fx.Node], maps: Sequence[Tensor]
) -> list[Tensor]:
    """The maps that say which units the result has.

    What is spread over units of the other operand is needed by all of them, and stays.
    """
    shape, kept = seen.shape_of(node), []
    full = [(1,) * (len(shape) - n.dim()) + tuple(n.shape) for n in map(seen.units.labels_of, data)]
    for i in (0, 1):
        spread = any(
            full[i][axis] == 1 and shape[axis] > 1 and maps[1 - i].shape[axis] > 1
            for axis in range(len(shape))
        )
        if spread:
            seen.units.found.ground(array(maps[i]), Cause(node, describe(node)))
        else:
            kept.append(maps[i])
    if len(kept) == 2:
        _tie(seen, node, *kept)
    if not kept:
        raise Opaque
    return kept


def both(rule: Callable[[Walk, fx.Node], Any]) -> Rule:
    """A rule of labels that moves elements, whatever they are."""
    return lambda seen, node: (rule(seen.units, node), rule(seen.bits, node))


def pool(seen: Look, node: fx.Node) -> tuple[Any, Any]:
    """The same units; a constant stays what it is, but where padded zeros are counted."""
    units = rules_axes.pool(seen.units, node)
    source, out = argument(node, 0, "input"), seen.shapes.values[node]
    spatial = int(next(c for c in base_name(call_name(node)) if c.isdigit()))
    counted = passage_of(node) is Passage.AVERAGE_POOL and rules_axes.counts_padding(node)
    axis = len(seen.units.labels_of(source).shape) - 1 - spatial
    c = seen.numbers(source, axis)
    c = np.where(c == 0, c, np.nan) if counted else c
    if isinstance(out, tuple | list):
        bits = _spread(c, axis, out[0].shape)
        return units, (bits, unknown_map(out[1].shape))
    return units, _spread(c, axis, seen.shape_of(node))


def _spread(c: Any, axis: int, shape: Sequence[int]) -> Tensor:
    return bits_of(torch.from_numpy(c).reshape(_view(shape, axis)), shape)


def interpolate(seen: Look, node: fx.Node) -> tuple[Any, Any]:
    """The same units; means of a constant are that constant."""
    c = seen.numbers(argument(node, 0, "input"), 1)
    return rules_axes.interpolate(seen.units, node), _spread(c, 1, seen.shape_of(node))


def reduce(seen: Look, node: fx.Node) -> tuple[Any, Any]:
    """Means and sums over axes along which units don't change."""
    source = argument(node, 0, "input")
    small, shape = compact(settled(seen.units.labels_of(source))), seen.shape_of(node)
    axes = rules_axes.reduced_axes(node, small.dim())
    if any(small.shape[axis] > 1 for axis in axes):
        raise Opaque
    known = seen.number(source)
    if any(known.shape[axis] > 1 for axis in axes):
        known = torch.full((), torch.nan, dtype=torch.float64, device="cpu")
    else:
        known = known if len(shape) == small.dim() else known.squeeze(tuple(axes))
    if passage_of(node) is Passage.SUM:
        known = torch.where(known == 0, known, torch.nan)
    return rules_axes.reduce(seen.units, node), bits_of(known, shape)


def pad(seen: Look, node: fx.Node) -> tuple[Any, Any]:
    """Zeros beside zeros are no change."""
    source, shape = argument(node, 0, "input"), seen.shape_of(node)
    inner = _inner(seen, source)
    moved = rules_axes.padded_axes(node, len(inner))
    as_before = [axis for axis in range(len(inner)) if axis not in moved]
    varying = [axis for axis, size in enumerate(inner) if size > 1]
    if not as_before or not {*varying} <= {*as_before}:
        raise Opaque
    axis = (varying or as_before)[0]
    units = rules_axes.pad(seen.units, node)
    c = seen.numbers(source, axis)
    return units, _spread(np.where(c == 0, c, np.nan), axis, shape)


def _inner(seen: Look, source: object) -> Sequence[int]:
    return compact(settled(seen.units.labels_of(source))).shape


def nothing(seen: Look, node: fx.Node) -> tuple[Any, Any]:
    """Sizes have no channels; a tensor of that shape does."""
    leaves = pytree.tree_leaves(seen.shapes.values.get(node))
    if any(is_tensor(leaf) for leaf in leaves):
        raise Opaque
    return seen.units.grounded(node), seen.unknown(node)


_RULES: dict[Passage, Rule] = {
    Passage.AFFINE: affine,
    Passage.BATCH_NORM: batch_norm,
    Passage.MOVE: both(rules_elements.move),
    Passage.IDENTITY: both(rules_elements.identity),
    Passage.CONCAT: both(rules_elements.concatenate),
    Passage.STACK: both(rules_elements.stack),
    Passage.ADD: combined,
    Passage.SUBTRACT: combined,
    Passage.MULTIPLY: combined,
    Passage.DIVIDE: combined,
    Passage.EXTREMUM: combined,
    Passage.MAX_POOL: pool,
    Passage.AVERAGE_POOL: pool,
    Passage.INTERPOLATE: interpolate,
    Passage.MEAN: reduce,
    Passage.SUM: reduce,
    Passage.PAD: pad,
    Passage.SHAPE: nothing,
}
