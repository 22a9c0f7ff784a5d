"""What insertion is going to do to a model, and the doing of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from bnfx.editing.affine_calls import Evidence, join, observed, traced
from bnfx.editing.consumers import describe
from bnfx.editing.inserted import InsertedGraph, Origin
from bnfx.editing.preservation import agrees
from bnfx.editing.regions import Regions, share_out
from bnfx.errors import CaptureError, InsertError
from bnfx.graphs.examples import Example, clone
from bnfx.graphs.observed import observe
from bnfx.graphs.training import ModuleGraph, module_graph
from bnfx.passes import InsertBatchNorm, InsertSite, never_called
from bnfx.reports.report import InsertRecord, InsertReport


@dataclass(frozen=True)
class InsertPlan:
    """What is to be done to `root`, a private copy of the model.

    Attributes:
        root: The copy; where `whole` exists, the module that it was traced from.
        whole: The trace of the whole model, None where there is none.
        entries: Sites and records of the affine calls in order, then of what is never called.
        regions: Which part is rewritten for which site.
        called_in_eval: Paths of the layers that the model called in eval mode on the example.
    """

    root: nn.Module
    whole: ModuleGraph | None
    entries: Sequence[InsertSite | InsertRecord]
    regions: Regions
    called_in_eval: frozenset[str]


def make_plan(model: nn.Module, given: Example | None, insertion: InsertBatchNorm) -> InsertPlan:
    """Look at `model` (once it is clear that it can be looked at), and change nothing."""
    _require_model(model)
    whole = _whole(model, given)
    evidences = [] if given is None else _observed(model, given, whole)
    root = clone(model) if whole is None else whole.root
    if given is None:
        evidences = [traced(whole)] if whole is not None else []
        evidences += _traced_parts(root, whole.opaque if whole is not None else [""])
    entries: list[InsertSite | InsertRecord] = []
    calls: Counter[str] = Counter()
    runs: dict[str, int] = {}
    for evidence in evidences:
        # A later one tells only of layers that no earlier one saw: those called in training alone.
        news = [call.path for call in evidence.calls if call.path not in calls]
        entries += [e for e in insertion.match(evidence) if _path(e) in news]
        calls.update(news)
        runs = {**evidence.runs, **runs}
    entries += never_called(
        root, set(calls), lambda path: _why_unseen(root, path, evidences, given)
    )
    if not entries:
        raise InsertError(
            f"{type(model).__name__} has no affine layer (linear, convolution or transposed "
            "convolution), so there is nothing to normalise"
        )
    sites = [entry for entry in entries if isinstance(entry, InsertSite)]
    behind = insertion.placement == "post_activation"
    regions = share_out(root, sites, whole, calls=calls, runs=runs, behind=behind)
    first = evidences[0].calls if given is not None else ()
    return InsertPlan(root, whole, entries, regions, frozenset(call.path for call in first))


def _path(entry: InsertSite | InsertRecord) -> str:
    return entry.call.path if isinstance(entry, InsertSite) else entry.path


def _observed(model: nn.Module, given: Example, whole: ModuleGraph | None) -> list[Evidence]:
    """Evidence from a run in eval mode, and from one in train mode where that can tell more."""
    root = clone(model)
    found = [observed(root, observe(root, given, training=False))]
    if whole is not None and not whole.opaque:
        return found  # one graph serves both modes
    try:
        found.append(observed(root, observe(root, given, training=True)))
    except CaptureError:
        return found  # it wants targets, or larger batches; eval mode has told enough
    return found


def _whole(model: nn.Module, given: Example | None) -> ModuleGraph | None:
    """The trace of the whole model, where there is one and it does what the model does."""
    try:
        captured = module_graph(clone(model), given)
    except CaptureError:
        return None
    return captured if given is None or agrees(model, captured, given) else None


def _traced_parts(root: nn.Module, paths: Iterable[str]) -> list[Evidence]:
    """Evidence from the largest parts inside the modules at `paths` that can be traced."""
    found: list[Evidence] = []
    for path in paths:
        for name, child in root.get_submodule(path).named_children():
            inner = join(path, name)
            try:
                captured = module_graph(clone(child), None)
            except CaptureError:
                found += _traced_parts(root, [inner])
                continue
            found.append(traced(captured, inner))
            found += _traced_parts(root, [join(inner, kept) for kept in captured.opaque])
    return found


def _why_unseen(
    root: nn.Module, path: str, evidences: Sequence[Evidence], given: Example | None
) -> str:
    """Why no affine call came from the layer at `path`."""
    for evidence in evidences:
        name = f"{path}.weight"[len(evidence.prefix) :].removeprefix(".")
        for node in evidence.graph.nodes:
            if node.op == "get_attr" and node.target == name and node.users:
                return (
                    f"its weight goes into {describe(next(iter(node.users)))!r}, not a layer call"
                )
    if given is not None:
        return "the forward did not call it on the example, in eval or in train mode"
    calls = {str(n.target) for e in evidences for n in e.graph.nodes if n.op == "call_module"}
    outer = [path.rpartition(".")[0]]
    while outer[-1]:
        outer.append(outer[-1].rpartition(".")[0])
    whole = next((p for p in outer if p in calls), None)
    if whole is None and any(evidence.prefix == "" for evidence in evidences):
        return "the forward never calls it"
    kind = type(root.get_submodule(whole or "")).__name__
    return f"the forward of {kind} around it cannot be traced; pass example_inputs"


def carry_out(
    plan: InsertPlan, insertion: InsertBatchNorm
) -> tuple[nn.Module, dict[InsertSite, Origin]]:
    """Rewrite the regions. The new model, and where each BatchNorm is in it."""
    origins: dict[InsertSite, Origin] = {}
    for region, sites in plan.regions.sites.items():
        if region:
            module = plan.root.get_submodule(region)
            captured = module_graph(module, None)
            made = insertion.rewrite(captured, sites, region)
            graph = InsertedGraph.build(module, captured.graph, [*made.values()], like=module)
            _replace(plan.root, module, graph)
            origins |= {site: _below(region, origin) for site, origin in made.items()}
    if plan.whole is None:
        return plan.root, origins
    made = insertion.rewrite(plan.whole, plan.regions.sites.get("", ()), "")
    inserted = InsertedGraph.build(plan.root, plan.whole.graph, [*made.values()])
    return inserted, origins | made


def _below(region: str, origin: Origin) -> Origin:
    bias = None if origin.bias is None else join(region, origin.bias)
    return Origin(join(region, origin.layer), bias, join(region, origin.norm))


def _replace(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` into every slot that holds `old`."""
    for path, module in [*root.named_modules(remove_duplicate=False)]:
        if module is old:
            parent, _, leaf = path.rpartition(".")
            root.get_submodule(parent).add_module(leaf, new)
        if isinstance(module, nn.TransformerEncoderLayer) and old in module.children():
            # Its fused kernel for inference would take the weights and leave the BatchNorm out.
            module.activation_relu_or_gelu = 0


def report_of(plan: InsertPlan, origins: Mapping[InsertSite, Origin]) -> InsertReport:
    """One record for each entry of the plan."""
    records = []
    for entry in plan.entries:
        if isinstance(entry, InsertRecord):
            records.append(entry)
            continue
        call, refused = entry.call, plan.regions.refused.get(entry)
        records.append(
            InsertRecord(
                path=call.path,
                kind=call.row.kind,
                channels=entry.channels,
                action="skipped" if refused else "inserted",
                bn_path=None if refused else origins[entry].norm,
                reason=refused or f"feeds {describe(entry.nonlinearity)!r}",
            )
        )
    return InsertReport(tuple(records))


def _require_model(model: nn.Module) -> None:
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        raise InsertError(f"the model is a {kind}, not a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise InsertError(
            f"{kind} is TorchScript, which cannot be changed; give the original model"
        )
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise InsertError(f"{kind} is a wrapper; give model.module, and wrap the result")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise InsertError(
                f"{name!r} has no shape yet (a lazy module); run the model once first"
            )
