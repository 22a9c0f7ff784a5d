"""`fold_bn` and its dry run. The model given stays bit-identical; a new one is returned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from bnfx.aliasing import barred, freshen, restore
from bnfx.capture import assemble, example
from bnfx.inference_graph import inference_graph
from bnfx.operators import name_inplace_flag
from bnfx.passes import FoldBatchNorm
from bnfx.reports import FoldReport, remember, report


def fold_bn(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
) -> fx.GraphModule:
    """An inference graph of `model` with every provable BatchNorm folded into the layer before it.

    With s = gamma / sqrt(var + eps) and t = beta - mean s, the weight W becomes s W along its
    output channels and the bias b becomes s b + t (Ioffe & Szegedy 2015, Algorithm 2), computed in
    float64 and rounded once to the stored dtype. A BatchNorm for which that is not proved stays,
    with the reason in `bnfx.report(result)`.

    Args:
        model: Any module, in eval mode; a BatchNorm in train mode is left alone. Any device, any
            floating dtype.
        example_inputs: Tuple of positional arguments, or a lone tensor. Needed where the forward
            cannot be traced symbolically; useful where the rank of a tensor decides.
        example_kwargs: Keyword arguments that go with them.

    Returns:
        A `torch.fx.GraphModule` with the parameters at their original names.

    Raises:
        CaptureError: The model cannot be captured; the message says what to do.
    """
    given = example(example_inputs, example_kwargs)
    captured = inference_graph(model, given)
    graph = captured.module
    for node in graph.graph.nodes:
        name_inplace_flag(node)
    old = freshen(graph.graph, barred(graph.graph))
    folding = FoldBatchNorm(captured.inputs)
    done = folding.rewrite(graph, folding.match(graph))
    restore(graph.graph, old)
    return remember(assemble(graph, graph.graph), done)


def plan_fold(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
) -> FoldReport:
    """What `fold_bn` would do with the same arguments; nothing is changed."""
    done = report(fold_bn(model, example_inputs, example_kwargs=example_kwargs))
    assert isinstance(done, FoldReport)
    return done
