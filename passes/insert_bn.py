"""Insert BatchNorm behind affine layers that feed a nonlinearity.

The rule is that of Ioffe & Szegedy 2015, section 3.2: BN stands between an affine map and the
elementwise nonlinearity; every consumer of the layer's output takes BN's output instead (Algorithm
2); the layer's bias is subsumed by beta and dropped. From the layer, the nonlinearity is looked for
through shape-only operators, dropout, pooling, residual adds and products with constants. Left
alone, with the reason, are

1. the output head, and a layer whose sigmoid, tanh, ... is the model's output;
2. a layer whose output is normalised already;
3. a layer that reaches no elementwise nonlinearity, such as query, key and value projections;
4. a layer whose weight is tied to another operator;
5. a layer whose output does not depend on the model's input, so that there is no batch;
6. a layer that the forward never calls.

With placement "post_activation" the BatchNorm stands behind the nonlinearity instead, and the bias
stays. It must be the only nonlinearity that the layer feeds, with the channels still on their axis.
"""

from __future__ import annotations

import fnmatch
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnfx.editing.affine_calls import AffineCall, Evidence, evidences, never_called
from bnfx.editing.consumers import Ends, depends_on_input, describe, ends_of, reaches
from bnfx.editing.declarations import Preserved
from bnfx.editing.draft import Draft, Region, join
from bnfx.editing.regions import share_out
from bnfx.errors import InsertError
from bnfx.graphs.kept import Behind
from bnfx.graphs.origins import Origin
from bnfx.graphs.parameters import free_name
from bnfx.operators.table import Role, layer_call, role_of
from bnfx.reports.report import Change, InsertRecord

Init = Literal["fresh", "identity"]
Form = Literal["graph", "module"]
Placement = Literal["pre_activation", "post_activation"]
Filter = str | Sequence[str] | Callable[[InsertRecord], bool] | None

_BATCH_NORMS = {None: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@dataclass(frozen=True)
class Site:
    """An affine call that gets a BatchNorm."""

    call: AffineCall
    #: Number of channels to normalise.
    channels: int
    #: The call that its output reaches.
    nonlinearity: fx.Node
    #: Paths of the modules around that call.
    scopes: tuple[str, ...]
    #: Whether beta takes the place of the layer's bias.
    drops_bias: bool
    #: Path of the part of the model whose graph is edited.
    region: str = ""


@dataclass(frozen=True)
class InsertBatchNorm:
    """Put a BatchNorm behind every affine call that feeds a nonlinearity."""

    name: ClassVar[str] = "insert_bn"
    preserves: ClassVar[Preserved] = Preserved.STATE_KEYS | Preserved.STATE_VALUES

    #: "fresh" (gamma 1) or "identity" (gamma sqrt(1 + eps), so that eval outputs stay).
    init: Init = "fresh"
    placement: Placement = "pre_activation"
    #: Glob or globs over module paths, or a predicate on the record; None for all.
    include: Filter = None
    #: Likewise, for layers to leave alone.
    exclude: Filter = None
    #: "graph" for one graph where the whole can be traced; "module" to keep every class.
    form: Form = "graph"
    #: Added to the variance.
    eps: float = 1e-5
    #: Of the running statistics.
    momentum: float = 0.1

    def match(self, draft: Draft) -> list[Site | Change]:
        """One entry for each affine call, in execution order, then for what is never called.

        Raises:
            InsertError: A layer that is to be normalised was given unbatched input; no affine
                layer at all.
        """
        found = evidences(draft)
        entries: list[Site | Change] = []
        calls: Counter[str] = Counter()
        runs: dict[str, int] = {}
        for evidence in found:
            news = [call.path for call in evidence.calls if call.path not in calls]
            entries += [e for e in self._look_through(evidence) if _path(e) in news]
            calls.update(news)
            runs = {**evidence.region.runs, **runs}
        entries += [
            Change(self.name, path, row.kind, "kept", why, channels=channels)
            for path, row, channels, why in never_called(draft, found)
        ]
        if not entries:
            raise InsertError(
                f"{type(draft.source).__name__} has no affine layer (linear, convolution or "
                "transposed convolution), so there is nothing to normalise"
            )
        sites = [entry for entry in entries if isinstance(entry, Site)]
        wanted = [(site.call, site.scopes) for site in sites]
        shared = share_out(
            draft,
            wanted,
            calls=calls,
            runs=runs,
            behind=self.placement == "post_activation",
            kept=self.form == "module",
        )
        places = dict(zip(sites, shared, strict=True))
        return [
            self._placed(entry, *places[entry]) if isinstance(entry, Site) else entry
            for entry in entries
        ]

    def _placed(self, site: Site, region: str, why: str) -> Site | Change:
        return self._kept(site.call, why) if why else replace(site, region=region)

    def rewrite(self, draft: Draft, found: Sequence[Site | Change]) -> tuple[Change, ...]:
        """Put the BatchNorms into the graphs of their regions; the whole model's comes last."""
        sites: dict[str, list[Site]] = {}
        for entry in found:
            if isinstance(entry, Site):
                sites.setdefault(entry.region, []).append(entry)
        kept = self.form == "module"
        if draft.whole is not None and not kept:
            sites.setdefault("", [])
        done: dict[Site, Change] = {}
        for region in sorted(sites, key=lambda path: not path):
            done |= self._rewrite(draft.root, draft.open(region, kept=kept), sites[region])
        return tuple(done[entry] if isinstance(entry, Site) else entry for entry in found)

    def _look_through(self, evidence: Evidence) -> list[Site | Change]:
        taken: dict[fx.Node, AffineCall] = {}
        chosen: list[tuple[AffineCall, fx.Node | str]] = []
        for call in evidence.calls:
            found = self._look(evidence, call)
            if isinstance(found, fx.Node) and self.placement == "post_activation":
                first = taken.setdefault(found, call)
                if first is not call:
                    found = f"{describe(found)!r} has the BatchNorm of {first.path!r} already"
            chosen.append((call, found))
        served = {call.node for call, found in chosen if isinstance(found, fx.Node)}
        subsumed = served if self.placement == "pre_activation" else set()
        return [
            Site(
                call=call,
                channels=call.channels,
                nonlinearity=found,
                scopes=evidence.scopes(found),
                drops_bias=_may_drop(evidence, call, subsumed),
            )
            if isinstance(found, fx.Node) and call.channels is not None
            else self._kept(call, str(found))
            for call, found in chosen
        ]

    def _kept(self, call: AffineCall, why: str) -> Change:
        channels = call.channels or 0
        return Change(self.name, call.path, call.row.kind, "kept", why, channels=channels)

    def _look(self, evidence: Evidence, call: AffineCall) -> fx.Node | str:
        """The nonlinearity that gives `call` a BatchNorm, or why it gets none."""
        record = InsertRecord(call.path, call.row.kind, call.channels or 0, "skipped", None, "")
        if self.include is not None and not _chosen(self.include, record):
            return "not chosen by include"
        if self.exclude is not None and _chosen(self.exclude, record):
            return "chosen by exclude"
        if call.channels is None:
            return "its weight is computed in the forward; pass example_inputs to tell its channels"
        if call.weight is not None:
            dtype = evidence.parameter(call.weight).dtype
            if not dtype.is_floating_point:
                return f"its weight is {dtype}, and BatchNorm is for real numbers"
            tied = _other_readers(evidence, call)
            if tied:
                return f"its weight is tied: {tied} reads it too"
        ends = ends_of(call.node, evidence.modules)
        reason = _why_not(evidence, ends, call)
        if not reason and self.placement == "post_activation":
            reason = _why_not_behind(ends, evidence.modules)
        if reason:
            return reason
        _require_batch(call)
        return ends.nonlinearities[0]

    def _rewrite(
        self, root: nn.Module, region: Region, sites: Sequence[Site]
    ) -> dict[Site, Change]:
        """Put the BatchNorms of `sites` into one region of `root`."""
        here = {(call.path, call.index): call for call in Evidence(region).calls}
        wanted = [(site, here[site.call.path, site.call.index]) for site in sites]
        made = {site: self._insert(region, site, call) for site, call in wanted}
        dropped = {}
        for bias in {origin.bias: None for origin in made.values() if origin.bias is not None}:
            dropped[bias] = _names_of(root, [region.value(bias)])
            readers = [call for site, call in wanted if made[site].bias == bias]
            _drop_bias(region, bias, readers)
        region.origins += [alias for origin in made.values() for alias in _aliases(region, origin)]
        return {
            site: Change(
                self.name,
                site.call.path,
                site.call.row.kind,
                "changed",
                f"feeds {describe(site.nonlinearity)!r}",
                values=(
                    *dropped.get(origin.bias or "", ()),
                    *_names_of(root, _state(region, origin)),
                ),
                into=(region.name(origin.norm),),
                channels=site.channels,
            )
            for site, origin in made.items()
        }

    def _insert(self, region: Region, site: Site, call: AffineCall) -> Origin:
        root = region.root
        layer = call.path[len(region.path) :].removeprefix(".")
        norm = self._norm(region, site, call)
        norm.train(root.training)
        wanted = f"{layer}_bn" if layer else "bn"
        if region.kept and _is_counted(root, layer):
            wanted = f"{layer}.bn"
        name = free_name(root, wanted)
        parent, _, leaf = name.rpartition(".")
        root.get_submodule(parent).add_module(leaf, norm)
        behind = call.node
        if self.placement == "post_activation":
            behind = ends_of(call.node, region.modules).nonlinearities[0]
        per_row = call.row.spatial is None
        if region.kept and not layer and _is_result(region.graph, behind):
            region.behind = Behind(name, per_row)
        else:
            _put_behind(region.graph, behind, name, per_row=per_row)
        return Origin(layer, call.bias if site.drops_bias else None, name)

    def _norm(self, region: Region, site: Site, call: AffineCall) -> _BatchNorm:
        stored = [region.value(name) for name in (call.weight, call.bias) if name is not None]
        tensors = [tensor for tensor in stored if isinstance(tensor, Tensor)]
        like = tensors[0] if tensors else next(region.root.parameters())
        norm = _BATCH_NORMS[call.row.spatial](
            site.channels,
            eps=self.eps,
            momentum=self.momentum,
            device=like.device,
            # Statistics of half-precision models are float32: sums of squares overflow sooner.
            dtype=torch.promote_types(like.dtype, torch.float32),
        )
        norm.weight.requires_grad_(like.requires_grad)
        norm.bias.requires_grad_(tensors[-1].requires_grad if tensors else like.requires_grad)
        with torch.no_grad():
            if self.init == "identity":
                norm.weight.fill_(math.sqrt(1 + self.eps))
            if site.drops_bias and call.bias is not None:
                norm.bias.copy_(tensors[-1])
        return norm


def _path(entry: Site | Change) -> str:
    return entry.call.path if isinstance(entry, Site) else entry.path


def _names_of(root: nn.Module, tensors: Iterable[object]) -> list[str]:
    """Every name that these tensors have in the state_dict."""
    wanted = {id(tensor) for tensor in tensors}
    return [n for n, value in root.state_dict(keep_vars=True).items() if id(value) in wanted]


def _state(region: Region, origin: Origin) -> Iterable[object]:
    return region.root.get_submodule(origin.norm).state_dict(keep_vars=True).values()


def _aliases(region: Region, origin: Origin) -> list[Origin]:
    """`origin`, and the same under the other names that its layer has."""
    modules = dict(region.root.named_modules(remove_duplicate=False))
    layer, norm = modules.get(origin.layer), modules[origin.norm]
    norms = {p.rpartition(".")[0]: p for p, m in reversed(modules.items()) if m is norm}
    leaf = (origin.bias or "").removeprefix(f"{origin.layer}.")
    found = [origin]
    for path, module in modules.items():
        if module is layer and path != origin.layer:
            bias = None if origin.bias is None else join(path, leaf)
            found.append(Origin(path, bias, norms.get(path.rpartition(".")[0], origin.norm)))
    return found


def _is_counted(root: nn.Module, layer: str) -> bool:
    """Whether the parent of a layer goes through its children, so that one more would count."""
    parent = root.get_submodule(layer.rpartition(".")[0])
    return bool(layer) and isinstance(parent, nn.Sequential | nn.ModuleList | nn.ModuleDict)


def _is_result(graph: fx.Graph, node: fx.Node) -> bool:
    """Whether what a call gives is what the graph gives, and nothing else reads it."""
    [out] = graph.find_nodes(op="output")
    return out.args[0] is node and list(node.users) == [out]


def _put_behind(graph: fx.Graph, node: fx.Node, name: str, *, per_row: bool) -> None:
    """Make every consumer of `node` take the output of the BatchNorm `name` instead."""
    users = list(node.users)
    with graph.inserting_after(node):
        flat = graph.call_function(torch.flatten, (node, 0, -2)) if per_row else node
    with graph.inserting_after(flat):
        out = graph.call_module(name, (flat,))
    if per_row:
        with graph.inserting_after(out):
            out = graph.call_method("view_as", (out, node))
    for user in users:
        user.replace_input_with(node, out)


def _why_not(evidence: Evidence, ends: Ends, call: AffineCall) -> str:
    """Which part of the rule leaves this call alone; "" for none."""
    direct = [norm for norm in ends.norms if norm not in ends.past_add]
    if direct:
        return f"its output is normalised already, by {describe(direct[0])}"
    if not ends.nonlinearities and ends.norms:
        return f"its output is normalised already, behind an add, by {describe(ends.norms[0])}"
    if not ends.nonlinearities:
        if any(end.op == "output" for end in ends.others):
            if evidence.prefix:
                return (
                    f"its output leaves {evidence.prefix!r}, and what reads it there cannot be "
                    "traced; pass example_inputs"
                )
            return "output head: its output is the model's output"
        reached = describe(ends.others[0]) if ends.others else "nothing"
        return f"it feeds no elementwise nonlinearity but {reached}"
    modules = evidence.modules
    squashed = all(role_of(n, modules) is Role.SQUASHING for n in ends.nonlinearities)
    others = [other.node for other in evidence.calls]
    if squashed and not evidence.prefix and not reaches(call.node, others, modules):
        return f"output head: its {describe(ends.nonlinearities[0])} is the model's output"
    if not depends_on_input(call.node):
        return "its input does not depend on the model's input, so there is no batch to normalise"
    return ""


def _why_not_behind(ends: Ends, modules: Mapping[str, nn.Module]) -> str:
    """Why there can be no BatchNorm behind the nonlinearity; "" if there can be."""
    if len(ends.nonlinearities) > 1 or ends.others:
        return "its output is read by more than one nonlinearity, so behind them is no one place"
    nonlinearity = ends.nonlinearities[0]
    if nonlinearity in ends.past_move:
        return f"between it and {describe(nonlinearity)} the channels move to another axis"
    norms = ends_of(nonlinearity, modules).norms
    if norms:
        return f"behind {describe(nonlinearity)} it is normalised already, by {describe(norms[0])}"
    return ""


def _require_batch(call: AffineCall) -> None:
    if call.rank is None:
        return
    spatial = call.row.spatial
    if call.rank == 1 or (spatial is not None and call.rank != spatial + 2):
        raise InsertError(
            f"{call.row.kind} {call.path!r} got an unbatched input in the example: its output has "
            f"{call.rank} axes. BatchNorm takes statistics over a batch; give example_inputs with "
            "a leading batch axis"
        )


def _chosen(which: Filter, record: InsertRecord) -> bool:
    if which is None:
        return True
    if isinstance(which, str):
        return fnmatch.fnmatchcase(record.path, which)
    if isinstance(which, Sequence):
        return any(fnmatch.fnmatchcase(record.path, glob) for glob in which)
    return bool(which(record))


def _other_readers(evidence: Evidence, call: AffineCall) -> str:
    """Who else reads the call's weight: another module that holds it, or another operator."""
    parameter = evidence.parameter(str(call.weight))
    own = evidence.modules.get(call.path[len(evidence.prefix) :].removeprefix("."))
    for path, module in evidence.holders[id(parameter)]:
        if module is not own and path:
            return f"module {join(evidence.prefix, path)!r}"
    for node, user in evidence.users[id(parameter)]:
        other = evidence.at.get(user)
        if other is None or other.path != call.path or _weight_of(other) is not node:
            return f"operator {user.name!r}"
    return ""


def _weight_of(call: AffineCall) -> object:
    return layer_call(call.node)["weight"]


def _may_drop(evidence: Evidence, call: AffineCall, served: set[fx.Node]) -> bool:
    """Whether every reader of the call's bias gets a BatchNorm, so that beta can replace it."""
    if call.bias is None or call.node not in served:
        return False
    parameter = evidence.parameter(call.bias)
    if len(evidence.names[id(parameter)]) > 1:
        return False
    same = [other.node for other in evidence.calls if other.path == call.path]
    users = {user for _, user in evidence.users[id(parameter)]}
    if not served >= users.union(same):
        return False
    layer = evidence.modules.get(call.path[len(evidence.prefix) :].removeprefix("."))
    if layer is not None and layer._forward_hooks:
        return False  # a hook may change the output, and then its constant is none of beta's
    inside = any(call.bias.startswith(f"{path}.") for path in evidence.whole if path != call.path)
    return call.node.op == "call_module" or not inside


def _drop_bias(region: Region, bias: str, readers: Iterable[AffineCall]) -> None:
    path, _, leaf = bias.rpartition(".")
    region.root.get_submodule(path).register_parameter(leaf, None)
    for call in readers:
        if call.node.op == "call_module":
            continue
        old = layer_call(call.node)["bias"]
        if call.row.kind == "addmm":  # addmm has no form without one
            _without_addend(call)
        else:
            call.node.args = tuple(None if arg is old else arg for arg in call.node.args)
            kwargs = {k: None if arg is old else arg for k, arg in call.node.kwargs.items()}
            call.node.kwargs = kwargs
        if not old.users:
            region.graph.erase_node(old)


def _without_addend(call: AffineCall) -> None:
    given = layer_call(call.node)
    call.node.target = torch.mm
    call.node.args, call.node.kwargs = (given["input"], given["weight"]), {}
