"""A frame that is assigned from a map's own shift is the map of a frame of zeros: pad first.

Where a padded tensor is overwritten along its border with what a map of each place gives for zero,

    y = A(x),   p = pad(y),   p[border] = A(0)          p = A(pad(x)),

so that re-parameterised blocks can be merged (Ding et al., "Diverse Branch Block", 2021, section
3.2; Zhang et al., "Edge-oriented Convolution Block", 2021). A is made of convolutions of size one
without stride or padding and of maps of each channel, BatchNorms among them. The assignments go.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from bnfx.editing.declarations import Preserved
from bnfx.editing.inference_draft import MERGE, InferenceDraft
from bnfx.editing.linear_chains import Chain, Chains, zeros_added
from bnfx.editing.sums import alone
from bnfx.graphs.constants import Values
from bnfx.graphs.naming import owner_of
from bnfx.graphs.parameters import sweep
from bnfx.operators.calls import argument, base_name, call_name
from bnfx.operators.effects import writes
from bnfx.reports.report import Change

#: How far the frame may be from the map's shift, relative to the largest: both in float64.
_ROUNDED = 1e-13
#: Places inside the frame.
_INSIDE = 3
_WHOLE = slice(None)
#: How ATen spells an index.
_VIEWS = (torch.ops.aten.slice.Tensor, torch.ops.aten.select.int)
#: How ATen spells an end that is left out.
_END = torch.iinfo(torch.int64).max


@dataclass(frozen=True, eq=False)
class Frame:
    """A padded value whose border is assigned from the shift of the map before."""

    pad: fx.Node
    #: The assignments, in order.
    writers: tuple[fx.Node, ...]
    #: The slices that they assign to.
    slices: tuple[fx.Node, ...]
    #: The map, from what is to be padded.
    chain: Chain


@dataclass(frozen=True)
class PadFirst:
    """Pad before maps of each place whose shift the border is assigned from."""

    name: ClassVar[str] = "pad_first"
    preserves: ClassVar[Preserved] = Preserved.SIGNATURE | Preserved.STATE_VALUES

    def match(self, draft: InferenceDraft) -> list[Frame]:
        """Frames that are the map of zeros; of other assignments there is nothing to say."""
        pads = [node for node in draft.graph.nodes if _is_overwritten(node)]
        order = {node: at for at, node in enumerate(draft.graph.nodes)} if pads else {}
        chains: dict[int, Chains] = {}
        found = (_frame(draft, node, order, chains) for node in pads)
        return [frame for frame in found if frame is not None]

    def rewrite(self, draft: InferenceDraft, found: Sequence[Frame]) -> tuple[Change, ...]:
        """Carry out what `match` found."""
        return tuple(_rewrite(draft, frame, self.name) for frame in found)


def _is_overwritten(node: fx.Node) -> bool:
    widths = zeros_added(node) if node.op == "call_function" and "pad" in call_name(node) else None
    return widths is not None and any(map(any, widths)) and next(_writers(node), None) is not None


@dataclass(frozen=True)
class _Assignment:
    """A call that assigns to a part of a tensor."""

    call: fx.Node
    value: object
    #: One entry for each of the first axes.
    index: tuple[Any, ...]
    #: The slices on the way to it.
    slices: tuple[fx.Node, ...] = ()


def _writers(value: fx.Node, on: tuple[fx.Node, ...] = ()) -> Iterator[_Assignment]:
    """The assignments to parts of `value`, which is a slice of the whole."""
    for user in value.users:
        if user.target is operator.setitem and user.args[0] is value and not on:
            index = user.args[1]
            yield _Assignment(user, user.args[2], index if isinstance(index, tuple) else (index,))
        elif user.target is torch.ops.aten.copy_.default and user.args[0] is value:
            yield _Assignment(user, user.args[1], _index(on), on)
        elif user.target in _VIEWS and (not on or on[-1].target is not _VIEWS[1]):
            yield from _writers(user, (*on, user))


def _index(slices: Sequence[fx.Node]) -> tuple[Any, ...]:
    """What slices behind each other leave, one axis after the other."""
    axes: dict[Any, Any] = {}
    for node in slices:
        axis, start = argument(node, 1, "dim", 0), argument(node, 2, "start")
        if node.target is _VIEWS[1]:  # the last one: an axis less
            axes[axis] = argument(node, 2, "index") if axis not in axes else slice(1, 0)
            continue
        end, step = argument(node, 3, "end"), argument(node, 4, "step", 1)
        whole = start in (None, 0) and (end is None or end == _END) and step == 1
        if not whole:  # twice along an axis: nothing is said of it
            axes[axis] = slice(start, end, step) if axis not in axes else slice(1, 0)
    known = [axis for axis in axes if isinstance(axis, int) and axis >= 0]
    return tuple(axes.get(axis, _WHOLE) for axis in range(max(known, default=-1) + 1))


def _frame(
    draft: InferenceDraft, pad: fx.Node, order: dict[fx.Node, int], known: dict[int, Chains]
) -> Frame | None:
    widths, source = zeros_added(pad), argument(pad, 0, "input")
    written = sorted(_writers(pad), key=lambda entry: order[entry.call])
    if widths is None or not isinstance(source, fx.Node) or not alone(source):
        return None
    if not _is_read_behind(pad, written, order):
        return None
    spatial = len(widths)
    if spatial not in known:
        known[spatial] = Chains(draft, spatial, sums=False, barred=frozenset())
    chain = _map_before(draft, known[spatial], source)
    if chain is None:
        return None
    shift = chain.build().bias
    filled = _filled(draft.values.widened(), written, widths[::-1], len(shift))
    if filled is None:
        return None
    inside = (_WHOLE, _WHOLE, *(slice(low, low + _INSIDE) for low, _ in widths[::-1]))
    wanted = shift.reshape(1, -1, *[1] * len(widths)).expand(filled.shape).clone()
    wanted[inside] = torch.nan
    same = torch.equal(filled.isnan(), wanted.isnan())
    far = (filled - wanted).nan_to_num().abs().max() if same else torch.inf
    if float(far) > _ROUNDED * float(shift.abs().max()):
        return None
    slices = tuple(dict.fromkeys(node for entry in written for node in entry.slices))
    return Frame(pad, tuple(entry.call for entry in written), slices, chain)


def _is_read_behind(
    pad: fx.Node, written: Sequence[_Assignment], order: dict[fx.Node, int]
) -> bool:
    """Whether all that reads the padded value comes behind the assignments, and writes nothing."""
    calls = {entry.call for entry in written}
    slices = {node for entry in written for node in entry.slices}
    last = max(order[call] for call in calls)
    others = [user for node in (pad, *slices, *calls) for user in node.users]
    readers = [user for user in others if user not in calls | slices]
    return all(order[r] > last and pad in r.all_input_nodes and not writes(r) for r in readers)


def _map_before(draft: InferenceDraft, chains: Chains, value: fx.Node) -> Chain | None:
    """The longest map of each place that gives `value`.

    Nothing else reads what is inside it, so nothing writes it either, and what it reads must not
    be written.
    """
    found, ones = None, (1,) * chains.spatial
    for chain in chains.of(value):
        g = chain.geometry
        if (g.kernel, g.stride) == (ones, ones) and not any(g.padding) and chain.nodes:
            found = chain
    return None if found is None or found.source in draft.barred else found


def _filled(
    values: Values,
    written: Sequence[_Assignment],
    widths: Sequence[tuple[int, int]],
    channels: int,
) -> Tensor | None:
    """What is assigned, in a small image; NaN elsewhere. None where other sizes may differ."""
    sizes = [low + _INSIDE + high for low, high in widths]
    image = torch.full((1, channels, *sizes), torch.nan, dtype=torch.float64, device="cpu")
    for entry in written:
        value = entry.value
        while isinstance(value, fx.Node) and base_name(call_name(value)) == "expand":
            value = value.args[0]
        known = values.operand(value)
        index = _spelled_out(entry.index, len(widths) + 2)
        bounds = [(0, 0), (0, 0), *widths]
        if known is None or index is None or not all(map(_is_border, index, bounds)):
            return None
        try:
            image[index] = known
        except RuntimeError:  # it has the sizes of the example
            return None
    return image


def _spelled_out(index: tuple[Any, ...], rank: int) -> tuple[Any, ...] | None:
    """An index with an entry for each axis."""
    if any(entry is Ellipsis for entry in index):
        at = next(at for at, entry in enumerate(index) if entry is Ellipsis)
        index = (*index[:at], *[_WHOLE] * (rank - len(index) + 1), *index[at + 1 :])
    index = (*index, *[_WHOLE] * (rank - len(index)))
    return index if len(index) == rank else None


def _is_border(entry: Any, width: tuple[int, int]) -> bool:
    """Whether an index takes a whole axis, or some of `width` at one end, whatever its size."""
    low, high = width
    if isinstance(entry, int):
        return -high <= entry < low
    if not isinstance(entry, slice) or entry.step not in (None, 1):
        return False
    start, end = entry.start, entry.stop
    if not all(n is None or isinstance(n, int) for n in (start, end)):
        return False
    if start in (None, 0):
        return end is None or 0 < end <= low
    return -high <= start < 0 and (end is None or end == _END)


def _rewrite(draft: InferenceDraft, frame: Frame, by: str) -> Change:
    """Pad what the map reads; what read the padded value reads the map."""
    graph, pad, nodes = draft.graph, frame.pad, frame.chain.nodes
    value, first, source = nodes[0], nodes[-1], frame.chain.source
    with graph.inserting_before(first):
        before = graph.node_copy(pad, lambda node: source if node is value else node)
    for node in (before, *nodes):  # their sizes are others
        node.meta = {key: known for key, known in node.meta.items() if key != "val"}
    first.replace_input_with(source, before)
    assigned = [node for writer in frame.writers for node in writer.all_input_nodes]
    for writer in frame.writers:
        graph.erase_node(writer)
    sweep([*frame.slices, *(node for node in assigned if node is not pad)])
    pad.replace_all_uses_with(value)
    sweep([pad])
    layers = tuple(dict.fromkeys(owner_of(name) for name in frame.chain.names))
    why = "zeros are padded before it, instead of its shift behind it"
    return Change(by, layers[0], MERGE, "changed", why, values=layers, into=layers[:1], at=pad.name)
