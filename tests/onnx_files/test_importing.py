"""The graph that is read from a file computes what onnxruntime computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from bnfx.graphs.shapes import shapes_of
from bnfx.onnx_files.foreign import Arithmetic, Foreign
from bnfx.onnx_files.importing import imported
from tests.support.onnx_graphs import Shape, Weights, distance, feed_of, graph, ints, run

W = (4, 3, 3, 3)


def check(model: onnx.ModelProto, *, foreign: int = 0, size: int = 8) -> None:
    """In float64 the graph computes what onnxruntime computes in float32.

    Args:
        model: The file.
        foreign: How many nodes torch has no function for.
        size: Of axes that are open.
    """
    feed = feed_of(model, size=size)
    read = imported(model, Path())
    kinds = [type(node.target) for node in read.module.graph.nodes]
    assert kinds.count(Foreign) == foreign
    inputs = [torch.from_numpy(feed[value.name]) for value in read.inputs]
    inputs = [v.double() if v.is_floating_point() else v for v in inputs]
    with torch.no_grad():
        outputs = read.module.double()(*inputs)
    truth = run(model, feed)
    for name, ours in zip(read.outputs, outputs, strict=True):
        assert distance(np.asarray(ours), truth[name]) < 2e-5, name


LAYERS: dict[str, tuple[str, Weights]] = {
    "bias": ("y = Conv(x, w, b)", {"w": W, "b": (4,)}),
    "uneven pads": ("y = Conv<pads=[0, 1, 2, 1]>(x, w)", {"w": W}),
    "groups": ("y = Conv<group=3, strides=[2, 1]>(x, w)", {"w": (6, 1, 3, 3)}),
    "dilations": ("y = Conv<dilations=[2, 1], pads=[2, 1, 2, 1]>(x, w)", {"w": W}),
    "upper": ('y = Conv<auto_pad="SAME_UPPER", strides=[2, 2]>(x, w)', {"w": (4, 3, 4, 3)}),
    "lower": ('y = Conv<auto_pad="SAME_LOWER", strides=[3, 2]>(x, w)', {"w": (4, 3, 4, 2)}),
    "valid": ('y = Conv<auto_pad="VALID">(x, w)', {"w": W}),
    "unset": ('y = Conv<auto_pad="NOTSET", pads=[1, 1, 1, 1]>(x, w)', {"w": W}),
    "transposed": ("y = ConvTranspose<strides=[2, 2]>(x, w, b)", {"w": (3, 4, 3, 3), "b": (4,)}),
    "transposed groups": ("y = ConvTranspose<group=3>(x, w)", {"w": (3, 2, 3, 3)}),
    "transposed pads": (
        "y = ConvTranspose<pads=[0, 1, 2, 1], strides=[2, 2], output_padding=[1, 0]>(x, w)",
        {"w": (3, 4, 3, 3)},
    ),
    "transposed dilations": (
        "y = ConvTranspose<dilations=[2, 2], pads=[1, 1, 1, 1]>(x, w)",
        {"w": (3, 4, 3, 3)},
    ),
    "transposed upper": (
        'y = ConvTranspose<auto_pad="SAME_UPPER", strides=[2, 2]>(x, w)',
        {"w": (3, 4, 3, 3)},
    ),
    "transposed lower": (
        'y = ConvTranspose<auto_pad="SAME_LOWER", strides=[2, 2]>(x, w)',
        {"w": (3, 4, 3, 3)},
    ),
    "output shape": (
        "y = ConvTranspose<output_shape=[18, 17], strides=[2, 2]>(x, w)",
        {"w": (3, 4, 4, 4)},
    ),
    "norm": (
        "y = BatchNormalization<epsilon=0.01>(x, s, b, mean, var)",
        {"s": (3,), "b": (3,), "mean": (3,), "var": (3,)},
    ),
    "instance norm": ("y = InstanceNormalization(x, s, b)", {"s": (3,), "b": (3,)}),
    "layer norm": ("y = LayerNormalization<axis=-2>(x, s, b)", {"s": (8, 8), "b": (8, 8)}),
    "layer norm without beta": ("y = LayerNormalization(x, s)", {"s": (8,)}),
    "product": ("y = MatMul(x, w)", {"w": (8, 5)}),
    "product and sum": ("h = MatMul(x, w)\ny = Add(b, h)", {"w": (8, 5), "b": (5,)}),
    "product and wide sum": ("h = MatMul(x, w)\ny = Add(h, b)", {"w": (8, 5), "b": (8, 5)}),
    "product on the left": ("y = MatMul(w, x)", {"w": (5, 8)}),
}


@pytest.mark.parametrize("opset", [11, 13, 17, 22])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, opset: int) -> None:
    nodes, weights = LAYERS[name]
    if "layer norm" in name and opset < 17:
        pytest.skip("LayerNormalization came with 17")
    check(graph(nodes, weights, opset=opset))


@pytest.mark.parametrize("spatial", [1, 3])
@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose"])
def test_layers_of_other_ranks(spatial: int, kind: str) -> None:
    weight = (3, 3, *[3] * spatial)
    check(graph(f"y = {kind}(x, w)", {"w": weight}, x=(2, 3, *[5] * spatial)))


@pytest.mark.parametrize("flat", [0, 1])
@pytest.mark.parametrize("across", [0, 1])
@pytest.mark.parametrize("summand", [(), (1,), (4,), (1, 4)])
def test_gemm(flat: int, across: int, summand: Shape) -> None:
    w = (4, 6) if flat else (6, 4)
    nodes = f"y = Gemm<alpha=0.5, beta=-2.0, transA={across}, transB={flat}>(x, w, c)"
    check(graph(nodes, {"w": w, "c": summand}, x=(6, 5) if across else (5, 6)))


def test_gemm_without_a_summand() -> None:
    check(graph("y = Gemm(x, w)", {"w": (6, 4)}, x=(5, 6)))


ELEMENTS: dict[str, str] = {
    "leaky": "y = LeakyRelu<alpha=0.3>(x)",
    "clip": "y = Clip(x, low, high)",
    "clip above": "y = Clip(x, low)",
    "relu": "y = Relu(x)",
    "sums": "h = Add(x, k)\nj = Sub(k, h)\ni = Mul(h, j)\ny = Div(i, low)",
    "identity": "y = Identity(x)",
    "dropout": "y = Dropout(x)",
    "cast": "y = Cast<to=1>(x)",
    "cast to double": "h = Cast<to=11>(x)\ny = Cast<to=1>(h)",
    "softmax": "y = Softmax<axis=-1>(x)",
    "max pool": "y = MaxPool<kernel_shape=[3, 2], strides=[2, 2], pads=[1, 0, 1, 1]>(x)",
    "max pool same": 'y = MaxPool<kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER">(x)',
    "max pool ceil": "y = MaxPool<kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1>(x)",
    "max pool dilated": "y = MaxPool<kernel_shape=[2, 2], dilations=[3, 2]>(x)",
    "average pool": "y = AveragePool<kernel_shape=[3, 3], pads=[1, 1, 1, 1]>(x)",
    "average pool counted": (
        "y = AveragePool<kernel_shape=[3, 3], pads=[0, 1, 1, 1], count_include_pad=1>(x)"
    ),
    "average pool ceil": "y = AveragePool<kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1>(x)",
    "global average": "y = GlobalAveragePool(x)",
    "global max": "y = GlobalMaxPool(x)",
    "prelu": "y = PRelu(x, k)",
    "extrema": "h = Max(x, k)\ny = Min(h, low)",
    "sum of one reader": "y = Sum(x, x)",
    "space": "y = SpaceToDepth<blocksize=2>(x)",
    "hard swish": "y = HardSwish(x)",
    "softplus": "y = Softplus(x)",
    "gelu": 'h = Gelu(x)\ny = Gelu<approximate="tanh">(h)',
    "shape": (
        "s = Shape(x)\nt = Slice(s, zero, two)\nu = Concat<axis=0>(t, minus)\ny = Reshape(x, u)"
    ),
}


@pytest.mark.parametrize("opset", [11, 13, 17, 22])
@pytest.mark.parametrize("name", ELEMENTS)
def test_elements(name: str, opset: int) -> None:
    weights: Weights = {"k": (3, 1, 1), "low": np.array(-0.4), "high": np.array(0.7)}
    sizes = {"zero": ints(0), "two": ints(2), "minus": ints(-1)}
    if opset < {"hard swish": 14, "gelu": 20}.get(name, 0):
        pytest.skip("it came later")
    check(graph(ELEMENTS[name], weights | sizes, opset=opset))


MOVES: dict[str, tuple[str, Weights]] = {
    "reshape": ("y = Reshape(x, s)", {"s": ints(0, -1, 4)}),
    "reshape to nothing": ("y = Reshape<allowzero=1>(x, s)", {"s": ints(2, 3, 64)}),
    "flatten": ("y = Flatten<axis=1>(x)", {}),
    "flatten behind": ("y = Flatten<axis=-1>(x)", {}),
    "flatten all": ("y = Flatten<axis=0>(x)", {}),
    "transpose": ("y = Transpose<perm=[0, 2, 3, 1]>(x)", {}),
    "reverse": ("y = Transpose(x)", {}),
    "unsqueeze": ("h = Unsqueeze(x, s)\ny = Squeeze(h, s)", {"s": ints(-1, -3)}),
    "unsqueeze mixed": ("y = Unsqueeze(x, s)", {"s": ints(1, -1)}),
    "split": ("a, b = Split<axis=-1>(x, s)\ny = Concat<axis=-1>(b, a)", {"s": ints(3, 5)}),
    "halves": ("a, b = Split<axis=2>(x)\ny = Concat<axis=1>(a, b, a)", {}),
    "a sequence of parts": (
        "q = SplitToSequence<axis=-1>(x, s)\na = SequenceAt(q, one)\nb = SequenceAt(q, last)\n"
        "y = Concat<axis=-1>(b, a)",
        {"s": ints(3, 5), "one": np.array(0), "last": np.array(-1)},
    ),
    "a sequence joined": (
        "q = SplitToSequence<axis=1>(x, s)\ny = ConcatFromSequence<axis=0, new_axis=1>(q)",
        {"s": np.array(1)},
    ),
    "a sequence of ones": (
        "q = SplitToSequence<axis=1>(x)\ny = ConcatFromSequence<axis=2>(q)",
        {},
    ),
    "slice": (
        "y = Slice(x, s, e, a, t)",
        {"s": ints(1, -5), "e": ints(2**62, -1), "a": ints(-1, 2), "t": ints(2, 1)},
    ),
    "backwards": (
        "y = Slice(x, s, e, a, t)",
        {"s": ints(-1), "e": ints(-(2**62)), "a": ints(1), "t": ints(-1)},
    ),
    "gather": ("y = Gather<axis=-1>(x, s)", {"s": ints(3, -1, 0)}),
    "gather one": ("y = Gather<axis=1>(x, s)", {"s": np.array(-1)}),
    "expand": ("h = Gather<axis=1>(x, i)\ny = Expand(h, s)", {"i": ints(0), "s": ints(5, 1, 1)}),
    "tile": ("y = Tile(x, s)", {"s": ints(1, 2, 1, 3)}),
    "pad": ("y = Pad(x, s)", {"s": ints(0, 1, 0, 2, 0, 0, 3, -1)}),
    "pad mirrored": ('y = Pad<mode="reflect">(x, s)', {"s": ints(0, 0, 1, 2, 0, 0, 3, 1)}),
    "pad repeated": ('y = Pad<mode="edge">(x, s)', {"s": ints(0, 0, 1, 2, 0, 0, 3, 1)}),
    "sizes": ("s = Shape<start=-1>(x)\nh = Cast<to=1>(s)\ny = Mul(x, h)", {}),
}


@pytest.mark.parametrize("name", MOVES)
def test_moves(name: str) -> None:
    check(graph(*MOVES[name], opset=17))


@pytest.mark.parametrize("name", MOVES)
def test_moves_of_open_sizes(name: str) -> None:
    """Places counted from behind have no function where the size is unknown."""
    check(graph(*MOVES[name], x=("n", 3, "h", "w")), foreign=int(name == "gather"))


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_to_space(mode: str) -> None:
    nodes = f'y = DepthToSpace<blocksize=2, mode="{mode}">(x)'
    check(graph(nodes, x=("n", 8, "h", "w")))


RESIZES = {
    "nearest": 'mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"',
    "linear": 'mode="linear", coordinate_transformation_mode="half_pixel"',
    "pytorch": 'mode="linear", coordinate_transformation_mode="pytorch_half_pixel"',
    "corners": 'mode="linear", coordinate_transformation_mode="align_corners"',
    "cubic": 'mode="cubic", coordinate_transformation_mode="half_pixel", cubic_coeff_a=-0.75',
}


@pytest.mark.parametrize("by", ["scales", "sizes"])
@pytest.mark.parametrize("name", RESIZES)
def test_resize(name: str, by: str) -> None:
    factors: Weights = {"none": np.zeros(0, np.float32), "f": np.array([1, 1, 2, 1.5], np.float32)}
    sizes: Weights = {"none": np.zeros(0, np.float32), "f": ints(2, 3, 11, 16)}
    inputs = "x, , f" if by == "scales" else "x, , , f"
    weights = factors if by == "scales" else sizes
    check(graph(f"y = Resize<{RESIZES[name]}>({inputs})", weights, opset=13))


@pytest.mark.parametrize("opset", [7, 8, 9])
def test_old_operators(opset: int) -> None:
    scales = "<scales=[1.0, 1.0, 2.0, 2.0]>(h)" if opset < 9 else "(h, f)"
    nodes = (
        "a = BatchNormalization(x, s, b, mean, var)\nc = Clip<min=-1.0, max=1.0>(a)\n"
        "d = Pad<pads=[0, 0, 1, 1, 0, 0, 1, 1], value=0.5>(c)\n"
        "e = Slice<starts=[1, 0], ends=[9, 100], axes=[3, 2]>(d)\n"
        "g = Unsqueeze<axes=[1]>(e)\nh = Squeeze<axes=[1]>(g)\n"
        f"k = Upsample{scales}\nl = Sum(k, k)\nm = ReduceMean<axes=[-1], keepdims=0>(l)\n"
        "y = ReduceSum<axes=[2]>(m)"
    )
    weights: Weights = {"s": (3,), "b": (3,), "mean": (3,), "var": (3,)}
    if opset == 9:
        weights["f"] = np.array([1, 1, 2, 2], np.float32)
    check(graph(nodes, weights, opset=opset, ir_version=3))


CONSTANTS = {
    "node": "w = Constant<value=float[2] {0.5, -2.0}>()",
    "numbers": "w = Constant<value_floats=[0.5, -2.0]>()",
    "identity": "w = Identity(k)",
    "cast": "h = Cast<to=10>(k)\nw = Cast<to=1>(h)",
    "computed": "h = Mul(k, k)\nw = Sqrt(h)",
    "transposed": "h = Transpose(m)\nw = Reshape(h, s)",
    "quantised": "h = Constant<value=int8[2] {5, -7}>()\nw = DequantizeLinear(h, q)",
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_are_seen_through(name: str) -> None:
    weights: Weights = {"k": (2,), "m": (2, 1), "s": ints(2), "q": np.array(0.1)}
    model = graph(f"{CONSTANTS[name]}\ny = Mul(x, w)", weights, x=(3, 2), opset=13)
    check(model)
    read = imported(model, Path())
    assert [source for _, source in read.parameters.values()] == ["w"]


def test_what_torch_has_no_function_for_is_foreign() -> None:
    nodes = "h = HardSigmoid(x)\nv, i = TopK(h, k)\nc = CumSum(v, z)\ny = Relu(c)"
    model = graph(nodes, {"k": ints(2), "z": np.array(1)})
    check(model, foreign=3)


def test_what_is_computed_from_sizes_alone_is_arithmetic() -> None:
    nodes = "s = Shape(x)\nh = Gather(s, i)\ni2 = Unsqueeze(h, z)\ny = Expand(o, i2)"
    model = graph(nodes, {"i": np.array(3), "z": ints(0), "o": (1,)}, x=("n", 3, "h", "w"))
    read = imported(model, Path())
    kinds = [type(node.target) for node in read.module.graph.nodes]
    assert kinds.count(Arithmetic) == 3
    assert read.module(torch.zeros(1, 3, 4, 5))[0].shape == (5,)


def test_initializers_that_are_inputs_may_be_overridden() -> None:
    model = graph("y = Conv(x, w)", {"w": W})
    model.graph.input.append(onnx.helper.make_tensor_value_info("w", 1, W))
    assert [value.name for value in imported(model, Path()).inputs] == ["x", "w"]
    model.ir_version = 3
    assert [value.name for value in imported(model, Path()).inputs] == ["x"]


def test_a_norm_in_training_has_a_shape() -> None:
    """Onnx infers none, and what lies behind it folds all the same."""
    nodes = "a, m, v = BatchNormalization<training_mode=1>(x, s, b, mean, var)\ny = Relu(a)"
    weights: Weights = {"s": (3,), "b": (3,), "mean": (3,), "var": (3,)}
    read = imported(graph(nodes, weights, opset=15), Path())
    (runs, *_) = shapes_of(read.module, (torch.empty(2, 3, 8, 8, device="meta"),), ())
    assert not runs.failures
