"""`fold_bn` and its dry run. The model given stays bit-identical; a new one is returned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from bnfx import arithmetic
from bnfx.aliasing import barred, freshen, restore
from bnfx.capture import Example, assemble, example
from bnfx.effects import name_inplace_flag
from bnfx.errors import FoldError
from bnfx.inference_graph import inference_graph
from bnfx.passes import FoldBatchNorm, FoldPlan, MergeBranches, Merged
from bnfx.reports import FoldReport, remember, report
from bnfx.shapes import EXACT, Shapes, shapes_of
from bnfx.walk import Options
from bnfx.writing import round_exact


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
    return _folded(model, given, options, merge_branches=merge_branches, rounded=True)


def exact_weights(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    merge_branches: bool = True,
    thresholds: bool = False,
    border_maps: bool = False,
) -> dict[str, Tensor]:
    """The state of `fold_bn`'s result before it is rounded: floating-point tensors in float64.

    The gauges are those for the dtype in which `model` is stored; a float64 copy of a half
    precision model may fold otherwise. Arguments and errors are those of `fold_bn`.
    """
    given = example(example_inputs, example_kwargs)
    options = Options(thresholds, border_maps)
    exact = _folded(model, given, options, merge_branches=merge_branches, rounded=False)
    state = exact.state_dict()
    return {k: v.double() if v.is_floating_point() else v for k, v in state.items()}


def _folded(
    model: nn.Module,
    given: Example | None,
    options: Options,
    *,
    merge_branches: bool,
    rounded: bool,
) -> fx.GraphModule:
    captured = inference_graph(model, given)
    graph = captured.module
    for node in graph.graph.nodes:
        name_inplace_flag(node)
    old = freshen(graph.graph, barred(graph.graph))
    order = {node.name: at for at, node in enumerate(graph.graph.nodes)}
    written = arithmetic.mark(graph)
    folding = FoldBatchNorm(captured.inputs, options)
    merged, plan = _planned(graph, folding, merge_branches=merge_branches)
    done = folding.rewrite(graph, plan, rounded=rounded)
    if rounded:
        round_exact(graph, merged.exact)
    restore(graph.graph, old)
    records = {**merged.records, **plan.records}
    records |= arithmetic.merged_records(written, plan.records, merged.provenance)
    names = sorted(records, key=lambda name: order[name.partition("/")[0]])
    provenance = _traced_back(merged.provenance, done.provenance)
    told = FoldReport(tuple(records[name] for name in names), provenance, plan.unavoidable)
    return remember(assemble(graph, graph.graph), told)


def _planned(
    graph: fx.GraphModule, folding: FoldBatchNorm, *, merge_branches: bool
) -> tuple[Merged, FoldPlan]:
    """Merge, and decide what to fold. Shapes and the like are gone before weights are written."""
    runs = shapes_of(graph, folding.inputs)
    merged = Merged()
    if merge_branches:
        merged, runs = _merge(graph, folding.inputs, runs)
    return merged, folding.match(graph, runs)


def _merge(
    graph: fx.GraphModule, inputs: Sequence[Any] | None, runs: list[Shapes]
) -> tuple[Merged, list[Shapes]]:
    """Merge branches until none are left: a sum may become a branch of the next one.

    Shapes are derived anew only where something was merged; those of the result come back too.
    """
    merging, done = MergeBranches(inputs), Merged()
    while sites := merging.match(graph, runs[0]):
        new = merging.rewrite(graph, sites)
        done.records.update(new.records)
        done.provenance.update(_traced_back(done.provenance, new.provenance))
        done.exact.update({name: done.exact.get(name, dtype) for name, dtype in new.exact.items()})
        graph.meta[EXACT] = dict(done.exact)
        runs = shapes_of(graph, inputs)
    return done, runs


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
