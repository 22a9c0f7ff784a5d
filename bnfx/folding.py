"""`fold_bn` and its dry run. The model given stays bit-identical; a new one is returned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from bnfx.errors import FoldError
from bnfx.gauges import written_out
from bnfx.gauges.walk import Options
from bnfx.gauges.writing import Written, round_exact
from bnfx.graphs.boxes import boxes
from bnfx.graphs.examples import Example, example, skeleton
from bnfx.graphs.in_place import barred, freshen, restore
from bnfx.graphs.inference import inference_graph
from bnfx.graphs.shapes import EXACT, Shapes, shapes_of
from bnfx.graphs.tracing import assemble
from bnfx.operators.effects import name_inplace_flag
from bnfx.passes import FoldBatchNorm, MergeBranches, Merged
from bnfx.reports.report import FoldReport, remember, report
from bnfx.unread import erase_unread

#: More merging than this after folding has not been seen; it would only be left undone.
_STAGES = 4


def fold_bn(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    merge_branches: bool = True,
    thresholds: bool = False,
    border_maps: bool = False,
) -> fx.GraphModule:
    """An inference graph of `model` with every BatchNorm folded that an exact rewrite can remove.

    In eval mode a BatchNorm is, per channel, y = s x + t with s = gamma / sqrt(var + eps) and
    t = beta - mean s (Ioffe & Szegedy 2015, Algorithm 2). Every tensor of the graph may be carried
    as x' = a (x + d), with a scale a and a displacement d per channel; one linear system says which
    BatchNorms vanish. Weights become a_o W / a_i and biases a_o (b + d_o - W d_i), computed in
    float64 and rounded once to the stored dtype. A BatchNorm for which that is not proved stays as
    one BatchNorm, with the reason in `bnfx.report(result)`; nothing is added to the graph.

    Weights that folding leaves as they are share their storage with the model's, so that memory
    holds them once: training or loading into the result in place would change the model too. Copy
    the result first (`copy.deepcopy`) to do that.

    Args:
        model: Any module, in eval mode; a BatchNorm in train mode is left alone. Any device, any
            floating dtype.
        example_inputs: Tuple of positional arguments, or a lone tensor. Needed where the forward
            cannot be traced symbolically; useful where the rank of a tensor decides.
        example_kwargs: Keyword arguments that go with them.
        merge_branches: Whether convolutions and identities of one input that are added become one
            convolution (RepVGG, MobileOne, FastViT).
        thresholds: Whether ReLU, ReLU6, Hardtanh and clamp may get a bound for each channel, which
            lets any map through. Fewer BatchNorms stay; a bound may cost more than a BatchNorm.
        border_maps: Whether a convolution that pads zeros may get a constant map added, which ties
            the result to the spatial size of the example. Needs example inputs.

    Returns:
        A `torch.fx.GraphModule` with the parameters at their original names; a convolution that
        branches were merged into is `<layer>.merged`.

    Raises:
        CaptureError: The model cannot be captured; the message says what to do.
        FoldError: border_maps without example inputs.
    """
    given = example(example_inputs, example_kwargs)
    if border_maps and given is None:
        raise FoldError("border_maps=True needs example_inputs: a map has the size of its input")
    options = Options(thresholds, border_maps)
    return _folded(model, given, options, merge_branches=merge_branches, rounded=True)[0]


def exact_graph(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    merge_branches: bool = True,
    thresholds: bool = False,
    border_maps: bool = False,
) -> fx.GraphModule:
    """`fold_bn`'s result before it is rounded: parameters and buffers in float64.

    The gauges are those for the dtype in which `model` is stored; a float64 copy of a half
    precision model may fold otherwise. Arguments and errors are those of `fold_bn`.
    """
    return fold_exactly(
        model,
        example_inputs,
        example_kwargs=example_kwargs,
        merge_branches=merge_branches,
        thresholds=thresholds,
        border_maps=border_maps,
    ).exact


@dataclass(frozen=True)
class Folded:
    """One folding in two forms: as `fold_bn` returns it, and before anything was rounded."""

    rounded: fx.GraphModule
    exact: fx.GraphModule


def fold_exactly(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    merge_branches: bool = True,
    thresholds: bool = False,
    border_maps: bool = False,
) -> Folded:
    """Fold once: `fold_bn`'s result, and the same graph with its new parameters in float64.

    The gauges of both are those for the dtype in which `model` is stored; parameters and buffers of
    the exact graph are all in float64. Arguments and errors are those of `fold_bn`.
    """
    given = example(example_inputs, example_kwargs)
    if border_maps and given is None:
        raise FoldError("border_maps=True needs example_inputs: a map has the size of its input")
    options = Options(thresholds, border_maps)
    graph, stored = _folded(model, given, options, merge_branches=merge_branches, rounded=False)
    exact = skeleton(graph).double()
    assert isinstance(exact, fx.GraphModule)
    read = graph.state_dict().keys()  # of stages in between some are gone
    round_exact(graph, {name: dtype for name, dtype in stored.items() if name in read})
    return Folded(graph, exact)


def _folded(
    model: nn.Module,
    given: Example | None,
    options: Options,
    *,
    merge_branches: bool,
    rounded: bool,
) -> tuple[fx.GraphModule, dict[str, torch.dtype]]:
    return _staged(model, given, options, 0, merge_branches=merge_branches, rounded=rounded)


def _staged(
    model: nn.Module,
    given: Example | None,
    options: Options,
    before: int,
    *,
    merge_branches: bool,
    rounded: bool,
) -> tuple[fx.GraphModule, dict[str, torch.dtype]]:
    """Merge and fold, `before` times with all weights kept in float64, and once more.

    A BatchNorm that vanished may have parted branches that can be merged now. Where that is found
    at the end, all is done again with one stage more before it, so that nothing is rounded twice.
    """
    captured = inference_graph(model, given)
    graph, inputs = captured.module, captured.inputs
    drawn = boxes(graph)
    for node in graph.graph.nodes:
        name_inplace_flag(node)
    old = freshen(graph.graph, barred(graph.graph))
    order = {node.name: at for at, node in enumerate(graph.graph.nodes)}
    done, folding = Merged(), FoldBatchNorm(inputs, options)
    written = written_out.mark(graph)
    done.records.update(erase_unread(graph.graph))
    runs = shapes_of(graph, inputs)
    for stage in range(before + 1):
        if merge_branches:
            runs = _merge(graph, inputs, runs, done)
        plan = folding.match(graph, runs)
        last = stage == before
        new = folding.rewrite(graph, plan, rounded=rounded and last)
        done.records.update(plan.records)
        _traced(done, new)
        if not last:
            graph.meta[EXACT] = dict(done.exact)
            runs = shapes_of(graph, inputs)
    if merge_branches and before < _STAGES and MergeBranches(inputs).match(graph, runs[0]):
        return _staged(
            *(model, given, options, before + 1), merge_branches=merge_branches, rounded=rounded
        )
    if rounded:
        round_exact(graph, done.exact)
    restore(graph.graph, old)
    records = done.records | written_out.merged_records(written, done.records, done.provenance)
    names = sorted(records, key=lambda name: order[name.partition("/")[0]])
    result = assemble(graph, graph.graph)
    told = FoldReport(
        tuple(records[name] for name in names),
        done.provenance,
        plan.unavoidable,
        graphs=(drawn, boxes(result)),
    )
    return remember(result, told), done.exact


def _merge(
    graph: fx.GraphModule, inputs: Sequence[Any] | None, runs: list[Shapes], done: Merged
) -> list[Shapes]:
    """Merge branches until none are left: a sum may become a branch of the next one.

    Shapes are derived anew only where something was merged; those of the result come back.
    """
    merging = MergeBranches(inputs)
    while sites := merging.match(graph, runs[0]):
        new = merging.rewrite(graph, sites)
        done.records.update(new.records)
        _traced(done, Written(new.provenance, new.exact))
        graph.meta[EXACT] = dict(done.exact)
        runs = shapes_of(graph, inputs)
    return runs


def _traced(done: Merged, new: Written) -> None:
    """Add what was written: sources that were written before are replaced by their own."""
    done.exact.update(
        {
            name: next(
                (done.exact[s] for s in new.provenance.get(name, ()) if s in done.exact), dtype
            )
            for name, dtype in new.dtypes.items()
        }
    )
    done.provenance.update(_traced_back(done.provenance, new.provenance))


def _traced_back(
    first: Mapping[str, tuple[str, ...]], then: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """Sources of `then`, where those that `first` made are replaced by their own sources."""
    traced = {
        name: tuple(dict.fromkeys(s for source in sources for s in first.get(source, (source,))))
        for name, sources in then.items()
    }
    return {**first, **traced}


def plan_fold(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    merge_branches: bool = True,
    thresholds: bool = False,
    border_maps: bool = False,
) -> FoldReport:
    """What `fold_bn` would do with the same arguments; nothing is changed."""
    done = report(
        fold_bn(
            model,
            example_inputs,
            example_kwargs=example_kwargs,
            merge_branches=merge_branches,
            thresholds=thresholds,
            border_maps=border_maps,
        )
    )
    assert isinstance(done, FoldReport)
    return done
