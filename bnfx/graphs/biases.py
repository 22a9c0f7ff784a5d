"""Whether a layer without a bias would add one, were it given one."""

from __future__ import annotations

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from bnfx.errors import CaptureError
from bnfx.graphs.examples import Example, clone
from bnfx.graphs.kept import plain_class
from bnfx.graphs.observed import observe
from bnfx.operators.table import affine_class, affine_of, layer_call

#: Size of the images on which a layer is tried.
_SIDE = 32


def takes_bias(module: nn.Module) -> bool:
    """Whether it is a layer of torch.nn, or of a subclass whose own forward hands its bias on.

    Layers that pad as TensorFlow does are such subclasses; the forward is run on zeros, with a bias
    and without.
    """
    if affine_class(plain_class(module)) is not None:
        return True
    if not isinstance(module, _ConvNd | nn.Linear) or "bias" not in module._parameters:
        return False
    if isinstance(module, nn.Linear):
        inputs, outputs, axes = module.in_features, module.out_features, 0
    else:
        inputs, outputs, axes = module.in_channels, module.out_channels, len(module.kernel_size)
    mine = clone(module)
    weight = mine._parameters.get("weight")
    if weight is None:
        return False
    given = Example((weight.new_zeros(1, inputs, *[_SIDE] * axes),), {})
    try:
        without = observe(mine, given, training=mine.training).graph
        mine._parameters["bias"] = nn.Parameter(weight.new_zeros(outputs))
        graph = observe(mine, given, training=mine.training).graph
    except CaptureError:
        return False
    return _calls(graph) == _calls(without) and _adds(graph)


def _calls(graph: fx.Graph) -> list[object]:
    return [node.target for node in graph.nodes if "call" in node.op]


def _adds(graph: fx.Graph) -> bool:
    """Whether one layer is called, whose bias is that of the module, and what else reads it."""
    layers = [node for node in graph.nodes if affine_of(node) is not None]
    biases = [node for node in graph.find_nodes(op="get_attr") if node.target == "bias"]
    if len(layers) != 1 or len(biases) != 1:
        return False
    return layer_call(layers[0])["bias"] is biases[0] and set(biases[0].users) == {layers[0]}
