"""Faults put into exported files on purpose, one at a time.

A fault takes the source module and the model of a right file, and changes the latter in place; it
returns False where the network has no place for it. Whatever it changes, the file stays valid ONNX.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from tests.support.fault_networks import Network

Inject = Callable[[Network, nn.Module, onnx.ModelProto], bool]
Edit = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Fault:
    """A fault and its name in reports."""

    name: str
    inject: Inject


def initializer(proto: onnx.ModelProto, name: str) -> TensorProto | None:
    return next((t for t in proto.graph.initializer if t.name == name), None)


def rewrite(proto: onnx.ModelProto, name: str, edit: Edit) -> bool:
    """Change an initialiser; False if there is none, or if nothing changes."""
    tensor = initializer(proto, name)
    if tensor is None:
        return False
    old = numpy_helper.to_array(tensor)
    new = edit(old.astype(np.float64)).astype(old.dtype)
    if new.shape == old.shape and np.array_equal(new, old, equal_nan=True):
        return False
    tensor.CopyFrom(numpy_helper.from_array(new, name))
    return True


def state(model: nn.Module, path: str, name: str) -> Tensor:
    """A parameter or statistic in float64; what a BatchNorm lacks is one or zero."""
    module = model.get_submodule(path)
    value = getattr(module, name)
    if value is None:
        size = module.running_mean if isinstance(module, nn.modules.batchnorm._BatchNorm) else None
        channels = size if isinstance(size, Tensor) else torch.zeros(1)
        value = torch.ones_like(channels) if name == "weight" else torch.zeros_like(channels)
    assert isinstance(value, Tensor)
    return value.detach().double()


def formula(which: int, scale: Callable[..., Tensor], shift: Callable[..., Tensor]) -> Inject:
    """Fold one layer by a wrong formula.

    `scale` gets gamma, beta, mean, var and eps; `shift` gets the right scale, gamma, beta, mean,
    var, eps and the layer's bias.
    """

    def inject(network: Network, model: nn.Module, proto: onnx.ModelProto) -> bool:
        if which >= len(network.pairs):
            return False
        path, norm = list(network.pairs.items())[which]
        layer = model.get_submodule(path)
        gamma, beta = state(model, norm, "weight"), state(model, norm, "bias")
        mean, var = state(model, norm, "running_mean"), state(model, norm, "running_var")
        eps = float(model.get_submodule(norm).eps)  # type: ignore[arg-type]  # of a BatchNorm
        bias = state(model, path, "bias") if layer.bias is not None else torch.zeros_like(mean)
        right = gamma / (var + eps).sqrt()
        s = scale(gamma, beta, mean, var, eps)
        b = shift(s, gamma, beta, mean, var, eps, bias)
        weight = state(model, path, "weight")
        groups = getattr(layer, "groups", 1)
        if isinstance(layer, nn.ConvTranspose2d):
            split = weight.unflatten(0, (groups, -1))
            scaled = (split * s.reshape(groups, 1, -1, 1, 1)).flatten(0, 1)
        else:
            scaled = weight * s.reshape(-1, *[1] * (weight.dim() - 1))
        assert right.shape == s.shape
        changed = rewrite(proto, f"{path}.weight", lambda _: scaled.numpy())
        return rewrite(proto, f"{path}.bias", lambda _: b.numpy()) or changed

    return inject


def _std(gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    return gamma / (var + eps).sqrt()


def _shift(
    s: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, eps: float, bias: Tensor
) -> Tensor:
    return beta + s * (bias - mean)


FORMULAS = {
    "eps forgotten": (lambda g, b, m, v, e: g / v.sqrt(), _shift),
    "eps of another framework": (lambda g, b, m, v, e: g / (v + 10 * e).sqrt(), _shift),
    "eps added to the deviation": (lambda g, b, m, v, e: g / (v.sqrt() + e), _shift),
    "gamma left out": (lambda g, b, m, v, e: 1 / (v + e).sqrt(), _shift),
    "variance for deviation": (lambda g, b, m, v, e: g / (v + e), _shift),
    "mean and var swapped": (
        lambda g, b, m, v, e: g / (m.abs() + e).sqrt(),
        lambda s, g, b, m, v, e, bias: b + s * (bias - v),
    ),
    "statistics of another run": (
        lambda g, b, m, v, e: g / (1.01 * v + e).sqrt(),
        lambda s, g, b, m, v, e, bias: b + s * (bias - 1.01 * m),
    ),
    "not folded": (
        lambda g, b, m, v, e: torch.ones_like(g),
        lambda s, g, b, m, v, e, bias: bias,
    ),
    "bias not scaled": (_std, lambda s, g, b, m, v, e, bias: bias + b - s * m),
    "mean not subtracted": (_std, lambda s, g, b, m, v, e, bias: b + s * bias),
    "mean added": (_std, lambda s, g, b, m, v, e, bias: b + s * (bias + m)),
    "beta left out": (_std, lambda s, g, b, m, v, e, bias: s * (bias - m)),
    "mean not scaled": (_std, lambda s, g, b, m, v, e, bias: b + s * bias - m),
}


def edited(suffix: str, edit: Edit, which: int = 0) -> Inject:
    """Edit the weight or bias of one folded layer."""

    def inject(network: Network, model: nn.Module, proto: onnx.ModelProto) -> bool:
        layers = [*network.pairs, *network.layers]
        return which < len(layers) and rewrite(proto, f"{layers[which]}.{suffix}", edit)

    return inject


def _channel(factor: float) -> Edit:
    def edit(array: np.ndarray) -> np.ndarray:
        array[-1] *= factor
        return array

    return edit


def _element(change: float) -> Edit:
    def edit(array: np.ndarray) -> np.ndarray:
        flat = array.reshape(-1)
        flat[flat.size // 2] += change * np.abs(array).max()
        return array

    return edit


def _nan(array: np.ndarray) -> np.ndarray:
    array.reshape(-1)[0] = np.nan
    return array


def _half(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float16).astype(np.float64)


def _wrong_axis(array: np.ndarray) -> np.ndarray:
    factors = np.linspace(0.5, 1.5, array.shape[1]).reshape(1, -1, *[1] * (array.ndim - 2))
    return array * factors


EDITS: dict[str, tuple[str, Edit, int]] = {
    "gamma off by 1e-3 in one channel": ("weight", _channel(1 + 1e-3), 0),
    "gamma off by 1e-5 in one channel": ("weight", _channel(1 + 1e-5), 1),
    "sign of one channel": ("weight", _channel(-1), 0),
    "one channel zero": ("weight", _channel(0), 1),
    "one element": ("weight", _element(1e-4), 0),
    "one bias": ("bias", _element(1e-4), 0),
    "bias zero": ("bias", np.zeros_like, 0),
    "NaN in a weight": ("weight", _nan, 0),
    "NaN in a bias": ("bias", _nan, 1),
    "weight through half precision": ("weight", _half, 0),
    "scaled along the wrong axis": ("weight", _wrong_axis, 1),
    "channels in another order": ("weight", lambda a: np.roll(a, 1, 0), 0),
    "kernel transposed": ("weight", lambda a: a.swapaxes(-1, -2) if a.ndim > 3 else a, 0),
}


def swapped(kind: str) -> Inject:
    """Swap two initialisers of one shape, among weights or among vectors."""

    def inject(network: Network, model: nn.Module, proto: onnx.ModelProto) -> bool:
        tensors = [t for t in proto.graph.initializer if t.name.endswith(kind)]
        for i, a in enumerate(tensors):
            for b in tensors[i + 1 :]:
                if list(a.dims) == list(b.dims) and a.raw_data != b.raw_data:
                    a.raw_data, b.raw_data = b.raw_data, a.raw_data
                    return True
        return False

    return inject


def attribute(op: str, name: str, change: Callable[[onnx.AttributeProto], None]) -> Inject:
    """Change an attribute of the first node of a type that has it."""

    def inject(network: Network, model: nn.Module, proto: onnx.ModelProto) -> bool:
        for node in proto.graph.node:
            for found in node.attribute:
                if node.op_type == op and found.name == name:
                    change(found)
                    return True
        return False

    return inject


def _scale(factor: float) -> Callable[[onnx.AttributeProto], None]:
    def change(found: onnx.AttributeProto) -> None:
        found.f *= factor

    return change


def _shift_pads(found: onnx.AttributeProto) -> None:
    pads = list(found.ints)
    half = len(pads) // 2
    pads[0], pads[half] = pads[0] + 1, pads[half] - 1
    found.ints[:] = pads


def _training(found: onnx.AttributeProto) -> None:
    found.i = 1


ATTRIBUTES: dict[str, tuple[str, str, Callable[[onnx.AttributeProto], None]]] = {
    "epsilon of a BatchNorm that stayed": ("BatchNormalization", "epsilon", _scale(1.5)),
    "epsilon of a layer norm": ("LayerNormalization", "epsilon", _scale(100)),
    "pads shifted by one": ("Conv", "pads", _shift_pads),
    "slope of a leaky activation": ("LeakyRelu", "alpha", _scale(1 + 1e-4)),
    "alpha of a Gemm": ("Gemm", "alpha", _scale(1 + 1e-5)),
    "beta of a Gemm": ("Gemm", "beta", _scale(1 + 1e-4)),
}


def outputs_reordered(network: Network, model: nn.Module, proto: onnx.ModelProto) -> bool:
    values = list(proto.graph.output)
    del proto.graph.output[:]
    proto.graph.output.extend(reversed(values))
    return len(values) > 1


def output_in_double(network: Network, model: nn.Module, proto: onnx.ModelProto) -> bool:
    out = proto.graph.output[0]
    proto.graph.node.append(helper.make_node("Cast", [out.name], ["wide"], to=TensorProto.DOUBLE))
    out.name, out.type.tensor_type.elem_type = "wide", TensorProto.DOUBLE
    return True


def activation_removed(network: Network, model: nn.Module, proto: onnx.ModelProto) -> bool:
    for node in proto.graph.node:
        if node.op_type in ("Relu", "LeakyRelu", "Sigmoid", "Clip", "Gelu", "PRelu", "Tanh"):
            node.op_type = "Identity"
            del node.attribute[:], node.input[1:]
            return True
    return False


def activation_exchanged(network: Network, model: nn.Module, proto: onnx.ModelProto) -> bool:
    for node in proto.graph.node:
        if node.op_type in ("Relu", "Sigmoid", "LeakyRelu"):
            node.op_type = {"Relu": "Softplus", "Sigmoid": "HardSigmoid"}.get(node.op_type, "Relu")
            del node.attribute[:]
            return True
    return False


def hidden_cast(network: Network, model: nn.Module, proto: onnx.ModelProto) -> bool:
    """A weight goes through half precision on its way to its node, under its own name."""
    for index, node in enumerate(proto.graph.node):
        if node.op_type in ("Conv", "ConvTranspose", "Gemm"):
            half = helper.make_node("Cast", [node.input[1]], ["half"], to=TensorProto.FLOAT16)
            back = helper.make_node("Cast", ["half"], ["back"], to=TensorProto.FLOAT)
            node.input[1] = "back"
            proto.graph.node.insert(index, back)
            proto.graph.node.insert(index, half)
            return True
    return False


def decoy(network: Network, model: nn.Module, proto: onnx.ModelProto) -> bool:
    """The right weight stays under its name, and the node reads another one."""
    for node in proto.graph.node:
        tensor = initializer(proto, node.input[1]) if len(node.input) > 1 else None
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm") or tensor is None:
            continue
        array = numpy_helper.to_array(tensor).copy()
        array[0] *= 1 + 1e-3
        proto.graph.initializer.append(numpy_helper.from_array(array, "another"))
        keep = helper.make_node("Identity", [node.input[1]], ["kept_alive"])
        node.input[1] = "another"
        proto.graph.node.append(keep)
        return True
    return False


def hidden_factor(network: Network, model: nn.Module, proto: onnx.ModelProto) -> bool:
    """A weight is multiplied on its way, by nearly one."""
    for index, node in enumerate(proto.graph.node):
        if node.op_type in ("Conv", "ConvTranspose", "Gemm"):
            factor = numpy_helper.from_array(np.array(1 + 1e-5, np.float32), "nearly_one")
            proto.graph.initializer.append(factor)
            times = helper.make_node("Mul", [node.input[1], "nearly_one"], ["times"])
            node.input[1] = "times"
            proto.graph.node.insert(index, times)
            return True
    return False


def constant_changed(network: Network, model: nn.Module, proto: onnx.ModelProto) -> bool:
    """The last entry of a table, slope or scale that is no layer's weight."""
    for name in ("table.weight", "scale", "slope.weight", "kept.running_var", "kept.weight"):
        if rewrite(proto, name, _element(1e-4)):
            return True
    return False


def table_row_nan(network: Network, model: nn.Module, proto: onnx.ModelProto) -> bool:
    """NaN in a row of a table that no drawn token meets."""

    def edit(array: np.ndarray) -> np.ndarray:
        array[-1] = np.nan
        return array

    return rewrite(proto, "table.weight", edit)


def batch_written_out(network: Network, model: nn.Module, proto: onnx.ModelProto) -> bool:
    """The example's batch becomes a constant of the graph."""
    out = proto.graph.output[0]
    dims = out.type.tensor_type.shape.dim
    sizes = [2 if dim.dim_param else dim.dim_value for dim in dims]
    if network.name == "perceptron":
        sizes[0] = 3
    shape = numpy_helper.from_array(np.array(sizes, np.int64), "sizes")
    proto.graph.initializer.append(shape)
    proto.graph.node.append(helper.make_node("Reshape", [out.name, "sizes"], ["fixed"]))
    out.name = "fixed"
    return True


def shortcut_lost(network: Network, model: nn.Module, proto: onnx.ModelProto) -> bool:
    """A residual add takes the same operand twice."""
    for node in proto.graph.node:
        names = {t.name for t in proto.graph.initializer}
        if node.op_type == "Add" and not names & set(node.input):
            node.input[1] = node.input[0]
            return True
    return False


WHOLE: dict[str, Inject] = {
    "weights swapped": swapped(".weight"),
    "biases swapped": swapped(".bias"),
    "outputs reordered": outputs_reordered,
    "output in another dtype": output_in_double,
    "activation removed": activation_removed,
    "activation exchanged": activation_exchanged,
    "weight through a hidden Cast": hidden_cast,
    "weight through a hidden factor": hidden_factor,
    "right weight as a decoy": decoy,
    "constant changed": constant_changed,
    "NaN in an unused row of a table": table_row_nan,
    "batch size written out": batch_written_out,
    "shortcut lost": shortcut_lost,
}


def all_faults() -> Iterator[Fault]:
    """Every fault; those of formulas are put into the first and into the second layer."""
    for name, (scale, shift) in FORMULAS.items():
        for which in (0, 1):
            yield Fault(f"{name} (layer {which})", formula(which, scale, shift))
    for name, (suffix, edit, which) in EDITS.items():
        yield Fault(name, edited(suffix, edit, which))
    for name, (op, key, change) in ATTRIBUTES.items():
        yield Fault(name, attribute(op, key, change))
    for name, inject in WHOLE.items():
        yield Fault(name, inject)


def strip_claims(proto: onnx.ModelProto) -> None:
    """Take away whatever the file says about itself, names of its tensors included."""
    del proto.metadata_props[:]
    proto.producer_name = "somebody"
    names = {t.name: f"t{i}" for i, t in enumerate(proto.graph.initializer)}
    for tensor in proto.graph.initializer:
        tensor.name = names[tensor.name]
    for node in proto.graph.node:
        del node.metadata_props[:]
        for i, name in enumerate(node.input):
            node.input[i] = names.get(name, name)
