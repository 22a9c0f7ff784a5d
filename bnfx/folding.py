"""`fold_bn` and its dry run. The model given stays bit-identical; a new one is returned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from bnfx.capture import Example, assemble, example
from bnfx.inference_graph import inference_graph
from bnfx.operators import affine_of
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
    graph = inference_graph(model, given)
    folding = FoldBatchNorm(_ranks(graph, given))
    done = folding.rewrite(graph, folding.match(graph))
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


def _ranks(graph: fx.GraphModule, given: Example | None) -> dict[str, int]:
    """Rank of the output of every affine call on the example inputs, by node name."""
    if given is None:
        return {}
    ranks: dict[str, int] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            out = super().run_node(n)
            if isinstance(out, Tensor) and affine_of(n, {}) is not None and n.op == "call_function":
                ranks[n.name] = out.dim()
            return out

    placeholders = [str(n.target) for n in graph.graph.nodes if n.op == "placeholder"]
    flat = [*given.args, *given.kwargs.values()]
    if len(flat) != len(placeholders):
        return {}
    with torch.no_grad():
        Recorder(graph).run(*flat)
    return ranks
