"""Drop channels that count for nothing: what is constant, and what nobody reads.

A channel is dead if each layer behind it finds a constant c there, or has weights of zero for it in
all rows that are not dead themselves (Liu et al., "Network Slimming", 2017, drop by a threshold;
here only what is exactly zero). It leaves all layers that write and read it together:

    b' = b + W[:, c] c        W' = W without the rows and columns that are dead

and so do its entries of BatchNorms, slopes and constants on the way, of residual sums, of depthwise
layers and of gates. Where zeros are padded a constant does not go into the bias; one constant
channel stays and carries the others: W'[:, k] = W[:, k] + W[:, c] c / k. Widths are rounded up to
the target's block, with channels of zeros. Inputs and outputs keep their channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, fx

from bnfx.channels.dead import Channels, Truths, blocks, carrier, dead_units, gathered
from bnfx.channels.look import Layer, Look
from bnfx.channels.resizing import Call, Resizing, boxed
from bnfx.channels.rules import SLOPES, blocks_of, look
from bnfx.channels.telling import dropped, left
from bnfx.channels.widths import leaving
from bnfx.editing.declarations import Preserved
from bnfx.editing.inference_draft import InferenceDraft
from bnfx.gauges.constraints import Constraints
from bnfx.gauges.solution import WRITTEN
from bnfx.graphs.naming import describe, owner_of, path_of
from bnfx.graphs.norms import is_norm
from bnfx.graphs.parameters import sweep
from bnfx.graphs.shapes import Shapes, at_other_ranks
from bnfx.operators.calls import base_name, call_name, given_arguments
from bnfx.operators.table import layer_call
from bnfx.reports.report import Change


@dataclass(frozen=True)
class Dropping:
    """All that leaves a graph."""

    #: What is known of its channels.
    channels: Channels
    #: Unit -> whether it counts for nothing.
    dead: Truths
    #: Unit -> whether it leaves; the others that are dead become zeros.
    gone: Truths
    #: Calls that move elements and need other numbers for that.
    calls: Mapping[fx.Node, Call]
    #: Nodes whose rank the result must check, and that rank.
    guards: Mapping[fx.Node, int]
    #: What to tell of it.
    records: tuple[Change, ...]


@dataclass(frozen=True)
class DropDead:
    """Drop dead channels wherever that is exact."""

    name: ClassVar[str] = "drop_dead"
    preserves: ClassVar[Preserved] = Preserved.SIGNATURE | Preserved.STATE_VALUES

    #: Widths are rounded up to multiples of this.
    block: int = 16
    #: Names of nodes whose assumed rank is proved.
    proved: frozenset[str] = frozenset()

    def match(self, draft: InferenceDraft) -> list[Dropping | Change]:
        """What can leave, as one site, and why other channels that are constant stay."""
        found, barred = Constraints(), dict.fromkeys(draft.barred, WRITTEN)
        reads: dict[fx.Node, Tensor] = {}
        runs, guards = self._runs(draft)
        looks = [look(draft.graph, run, draft.values, found, barred, reads) for run in runs]
        channels = gathered(looks, found)
        dead = dead_units(channels)
        gone, calls = leaving(channels, dead, self.block)
        dead = dead[channels.of]
        kept = [*left(self.name, channels, dead, gone)]
        if not gone.any():
            return [*kept]
        records = tuple(dropped(self.name, channels, gone))
        return [Dropping(channels, dead, gone, calls, guards, records), *kept]

    def rewrite(
        self, draft: InferenceDraft, found: Sequence[Dropping | Change]
    ) -> tuple[Change, ...]:
        """Carry out what `match` found."""
        done: list[Change] = []
        for at, change in list(draft.changes.items()):
            if (change.by, change.action) == (self.name, "kept"):
                del draft.changes[at]  # what stays was looked for anew
        for entry in found:
            if isinstance(entry, Change):
                done.append(entry)
                continue
            for node, rank in entry.guards.items():
                draft.demand_rank(node, rank, f"the channels dropped behind {describe(node)}")
            _drop(draft, entry)
            done += entry.records
        return tuple(done)

    def _runs(self, draft: InferenceDraft) -> tuple[list[Shapes], dict[fx.Node, int]]:
        """Sizes to look at, those of other ranks among them, and ranks that are only assumed."""
        runs, guards = list(draft.runs), {}
        for node, rank in draft.runs[0].assumed.items():
            if node.name not in self.proved:
                others = at_other_ranks(draft.module, draft.runs, node)
                runs += others
                if not others:
                    guards[node] = rank
        return runs, guards


def _drop(draft: InferenceDraft, site: Dropping) -> None:
    seen = site.channels.looks[0]
    sizes = Resizing(seen, site.gone)
    for node in list(draft.graph.nodes):
        layer = site.channels.layers.get(node)
        if layer is not None:
            _narrow(draft, layer, site)
        elif node in site.calls:
            call = site.calls[node]
            node.op, node.target, node.args, node.kwargs = (
                call.op,
                call.target,
                call.args,
                dict(call.kwargs),
            )
        elif "call" in node.op and isinstance(seen.units.maps.get(node), Tensor):
            _slice_constants(draft, node, seen, sizes)


def _narrow(draft: InferenceDraft, layer: Layer, site: Dropping) -> None:
    """A layer with other weights, and a bias where constants went in."""
    dead, gone = site.dead, site.gone
    if not (dead[layer.x].any() or dead[layer.y].any()):
        return
    call, values = layer_call(layer.node), draft.values
    weight, bias = values.of(call["weight"]), values.of(call["bias"])
    assert weight is not None
    new, summand = _weights(layer, weight, bias, dead)
    rows = torch.from_numpy(~gone[layer.y]).reshape(len(new), -1)
    columns = torch.from_numpy(~gone[layer.x]).reshape(len(new), -1)
    stay = rows.any(1) | columns.any(1)
    narrow = torch.stack(
        [b[r][:, c] for b, r, c in zip(new[stay], rows[stay], columns[stay], strict=True)]
    )
    flat = (narrow.transpose(1, 2) if layer.row.transposed else narrow).flatten(0, 1)
    sources = values.sources(call["weight"]) + values.sources(call["bias"])
    named = {"weight": _put(draft, layer.node, call["weight"], "weight", flat, sources)}
    if summand is not None:
        kept = summand.reshape(len(new), -1)[rows]
        named["bias"] = _put(
            draft, layer.node, call["bias"], "bias", kept, sources, like=call["weight"]
        )
    given = given_arguments(layer.node)
    if int(stay.sum()) != int(call["groups"]):
        given["groups"] = int(stay.sum())
    given |= named
    old = layer.node.all_input_nodes
    layer.node.args = (given.pop("input"),)
    layer.node.kwargs = given
    sweep(old)


def _weights(
    layer: Layer, weight: Tensor, bias: Tensor | None, dead: Truths
) -> tuple[Tensor, Tensor | None]:
    """Weights in blocks, with zeros where they are dead, and the bias with the constants in it."""
    new = blocks_of(weight.detach(), layer.row.transposed, len(layer.reads)).clone()
    known = np.where(dead[layer.x], np.nan_to_num(layer.known), 0.0)
    summand = None if bias is None else bias.detach().double().clone()
    if known.any():
        new = new.double()
        summand = new.new_zeros(len(layer.y)) if summand is None else summand
    for g, block in enumerate(blocks(layer)):
        rows, columns = (
            torch.from_numpy(dead[units]).to(new.device)
            for units in (layer.y[block.outs], layer.x[block.ins])
        )
        c = torch.from_numpy(known[block.ins]).to(new.device)
        if bool((c != 0).any()):
            assert summand is not None
            part = new[g] * c.reshape(1, -1, *[1] * (new.dim() - 3))
            k = None if layer.even else carrier(layer, block, dead)
            if layer.even:
                summand[block.outs] += part.flatten(1).sum(1)
            elif k is not None:
                new[g, :, k] += part.sum(1) / float(layer.known[block.ins][k])
        new[g][:, columns] = 0
        new[g][rows] = 0
        if summand is not None:
            summand[block.outs][rows] = 0
    return new, summand


def _slice_constants(draft: InferenceDraft, node: fx.Node, seen: Look, sizes: Resizing) -> None:
    """Let constants of an elementwise call, or of a norm, lose the places that its result does."""
    places = sizes.kept(node)
    if all(bool(line.all()) for line in places):
        return
    for n in list(dict.fromkeys(node.all_input_nodes)):
        value = draft.values.of(n)
        if value is None or n in seen.units.data or not value.dim():
            continue
        per_channel = is_norm(node) or (value.dim() == 1 and base_name(call_name(node)) in SLOPES)
        lines = places[1:2] if per_channel else places[len(places) - value.dim() :]
        lines = tuple(
            line if size > 1 else torch.ones(1, dtype=torch.bool, device="cpu")
            for line, size in zip(lines, value.shape, strict=True)
        )
        if not all(bool(line.all()) for line in lines):
            cut = boxed(value.detach(), tuple(line.to(value.device) for line in lines))
            sources = draft.values.sources(n)
            node.replace_input_with(n, _put(draft, node, n, "constant", cut, sources))
            sweep([n])


def _put(
    draft: InferenceDraft,
    node: fx.Node,
    old: object,
    part: str,
    value: Tensor,
    sources: tuple[str, ...],
    like: object = None,
) -> fx.Node:
    """Store what `node` reads now: at its own name where nothing else reads that."""
    known = draft.values.known
    named = isinstance(old, fx.Node) and old.op == "get_attr"
    if named and isinstance(old, fx.Node) and len(known.readers[str(old.target)]) == 1:
        draft.put_back(name := str(old.target), value, sources=sources)
    else:
        kept = draft.values.sources(old) or draft.values.sources(like)
        own = owner_of(kept[0]) if named or like is not None else path_of(node)
        name = draft.put(f"{own}.{part}", value, like=kept[0], sources=sources)
    with draft.graph.inserting_before(node):
        return draft.graph.get_attr(name)
