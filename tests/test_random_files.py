"""Random files of every opset: folded, they compute what they did."""

from __future__ import annotations

import random
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bnfx
from bnfx.onnx_files.reading import all_nodes
from tests.support.onnx_graphs import Weights, distance, feed_of, graph, ints, run, saved

NEWEST = 22
#: Nodes that give (2, 4, 6, 6) of such values a and c; weights are shared as it happens.
NODES = (
    "{y} = Conv(a, {w1})",
    "{y} = Conv(a, {w1}, {b})",
    "{y} = Conv<pads=[1, 1, 1, 1]>(a, {w3}, {b})",
    '{y} = Conv<auto_pad="SAME_UPPER">(a, {w3})',
    "{y} = Conv<group=2, pads=[1, 1, 1, 1]>(a, {g3})",
    "{y} = ConvTranspose<pads=[1, 1, 1, 1]>(a, {w3})",
    "{y} = BatchNormalization(a, {s}, {b}, {m}, {var})",
    "{y} = BatchNormalization<epsilon=0.1>(a, {s}, {b}, {m}, {var})",
    "{y} = Relu(a)",
    "{y} = LeakyRelu<alpha=0.3>(a)",
    "{y} = Sigmoid(a)",
    "{y} = Add(a, c)",
    "{y} = Sub(a, c)",
    "{y} = Mul(a, c)",
    "{y} = Sum(a, c)",
    "{y} = Max(a, c)",
    "{y} = Mul(a, {k})",
    "{y} = Mul(k, a)",
    "{y} = Add({k}, a)",
    "{y} = Sub({k}, a)",
    "{y} = Div(a, {k})",
    "{y} = Neg(a)",
    "{y} = Identity(a)",
    "{y} = AveragePool<kernel_shape=[3, 3], pads=[1, 1, 1, 1]>(a)",
    "{y} = AveragePool<kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1>(a)",
    "{y} = MaxPool<kernel_shape=[3, 3], pads=[1, 1, 1, 1]>(a)",
    "{y}t = Transpose<perm=[0, 2, 3, 1]>(a)\n{y} = Transpose<perm=[0, 3, 1, 2]>({y}t)",
    "{y}r = Reshape(a, flat)\n{y} = Reshape({y}r, back)",
    "{y} = Gather<axis=1>(a, turned)",
    "{y}p = Concat<axis=1>(a, c)\n{y} = Conv({y}p, wide)",
    "{y} = PRelu(a, {slope})",
    # Constants of every shape that broadcasts, along other axes than the channels too.
    *(
        f"{{y}} = {op}(a, {k})"
        for op in ("Add", "Mul")
        for k in ("one", "none", "across", "down", "plane", "all", "batch", "mixed")
    ),
    # One and three dimensions, rows and products.
    "{y}r = Reshape(a, flat)\n{y}s = Conv<pads=[1, 1]>({y}r, {c1})\n{y} = Reshape({y}s, back)",
    "{y}r = Reshape(a, deep)\n{y}s = Conv<pads=[1, 1, 0, 1, 1, 0]>({y}r, {c3}, {b})\n"
    "{y} = Reshape({y}s, back)",
    "{y}r = Reshape(a, flat)\n{y}s = BatchNormalization({y}r, {s}, {b}, {m}, {var})\n"
    "{y} = Reshape({y}s, back)",
    "{y}t = Transpose<perm=[0, 2, 3, 1]>(a)\n{y}s = MatMul({y}t, {mm})\n"
    "{y} = Transpose<perm=[0, 3, 1, 2]>({y}s)",
    "{y}r = Reshape(a, flat)\n{y}s = MatMul({mm}, {y}r)\n{y} = Reshape({y}s, back)",
    "{y}t = Transpose<perm=[0, 2, 3, 1]>(a)\n{y}r = Reshape({y}t, rows)\n"
    "{y}s = Gemm<alpha=0.5, beta=2.0, transB=1>({y}r, {mm}, {b})\n"
    "{y}u = BatchNormalization({y}s, {s}, {b}, {m}, {var})\n{y}v = Reshape({y}u, unrows)\n"
    "{y} = Transpose<perm=[0, 3, 1, 2]>({y}v)",
    "{y}t = Transpose<perm=[1, 0, 2, 3]>(a)\n{y}r = Reshape({y}t, columns)\n"
    "{y}s = Gemm<transA=1, beta=0.5>({y}r, {mm}, {b})\n{y}v = Reshape({y}s, unrows)\n"
    "{y} = Transpose<perm=[0, 3, 1, 2]>({y}v)",
    # Transposed convolutions of all kinds, and what makes them small again.
    "{y}s = ConvTranspose<strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1]>(a, {w3}, {b})\n"
    "{y} = AveragePool<kernel_shape=[2, 2], strides=[2, 2]>({y}s)",
    "{y}s = ConvTranspose<group=2, strides=[2, 2], kernel_shape=[3, 3]>(a, {g3})\n"
    "{y} = MaxPool<kernel_shape=[3, 3], strides=[2, 2]>({y}s)",
    "{y} = ConvTranspose<group=4, pads=[1, 1, 1, 1]>(a, {d3})",
    "{y} = Conv<group=4, pads=[1, 1, 1, 1]>(a, {d3})",
    "{y} = Conv<pads=[2, 2, 2, 2], dilations=[2, 2]>(a, {w3})",
    # What lets nothing through, and what computes from the value itself.
    "{y} = InstanceNormalization(a, {s}, {b})",
    "{y}g = GlobalAveragePool(a)\n{y} = Mul(a, {y}g)",
    "{y}g = GlobalAveragePool(a)\n{y} = Add({y}g, a)",
    "{y} = Softmax<axis=1>(a)",
    "{y}s = SpaceToDepth<blocksize=2>(a)\n{y} = DepthToSpace<blocksize=2>({y}s)",
    # Subgraphs that read what lies around them.
    "{y} = If(yes) <then_branch = t () => (float[2, 4, 6, 6] t{y}) {{ t{y} = Conv(a, {w1}) }}, "
    "else_branch = e () => (float[2, 4, 6, 6] e{y}) "
    "{{ e{y} = BatchNormalization(c, {s}, {b}, {m}, {var}) }}>",
    "{y} = Loop(two, yes, a) <body = l (int64 i{y}, bool g{y}, float[2, 4, 6, 6] s{y}) => "
    "(bool o{y}, float[2, 4, 6, 6] n{y}) {{ o{y} = Identity(g{y}) n{y} = Add(s{y}, {k}) }}>",
)
#: Nodes that older operator sets do not have, and the first that does.
NEWER = (
    (11, "{y} = Clip(a, low, high)"),
    (11, "{y}p = Pad(a, frame)\n{y} = Conv({y}p, {w3})"),
    (11, '{y}p = Pad<mode="reflect">(a, frame)\n{y} = Conv({y}p, {w3}, {b})'),
    (
        11,
        "{y}r = Resize(a, void, twice)\n"
        "{y} = AveragePool<kernel_shape=[2, 2], strides=[2, 2]>({y}r)",
    ),
    (13, "{y}p, {y}q = Split<axis=1>(a, halves)\n{y} = Concat<axis=1>({y}q, {y}p)"),
    (13, "{y}p = Slice(a, zero, half, first)\n{y} = Concat<axis=1>({y}p, {y}p)"),
    (13, "{y}u = Unsqueeze(a, first)\n{y} = Squeeze({y}u, first)"),
    (14, "{y} = HardSwish(a)"),
    (17, "{y} = LayerNormalization<axis=2>(a, plane)"),
    (20, "{y} = Gelu(a)"),
)
WEIGHTS: Weights = {
    **{f"w1{at}": (4, 4, 1, 1) for at in "xz"},
    **{f"w3{at}": (4, 4, 3, 3) for at in "xz"},
    **{f"g3{at}": (4, 2, 3, 3) for at in "xz"},
    **{f"{name}{at}": (4,) for name in ("s", "b", "m", "var") for at in "xz"},
    **{
        f"k{at}": np.array([1.5, -0.5, 2.0, 1.0]).reshape(4, 1, 1) * n
        for n, at in enumerate("xz", 1)
    },
    **{f"slope{at}": (4, 1, 1) for at in "xz"},
    **{f"c1{at}": (4, 4, 3) for at in "xz"},
    **{f"c3{at}": (4, 4, 3, 3, 1) for at in "xz"},
    **{f"d3{at}": (4, 1, 3, 3) for at in "xz"},
    **{f"mm{at}": (4, 4) for at in "xz"},
    "wide": (4, 8, 1, 1),
    "one": (1,),
    "none": (),
    "across": (6,),
    "down": (6, 1),
    "plane": (6, 6),
    "all": (2, 4, 6, 6),
    "batch": (2, 1, 1, 1),
    "mixed": (4, 1, 6),
    "low": np.array(-0.5),
    "high": np.array(1.5),
    "void": np.zeros(0),
    "twice": np.array([1.0, 1.0, 2.0, 2.0]),
    "yes": np.array(True),  # a tensor of it
    "two": np.array(2),
    "zero": ints(0),
    "half": ints(2),
    "first": ints(1),
    "halves": ints(2, 2),
    "frame": ints(0, 0, 1, 1, 0, 0, 1, 1),
    "deep": ints(0, 0, 6, 6, 1),
    "rows": ints(-1, 4),
    "columns": ints(4, -1),
    "unrows": ints(-1, 6, 6, 4),
    "flat": ints(0, 0, -1),
    "back": ints(0, -1, 6, 6),
    "turned": ints(2, 0, 3, 1),
}
SLOTS = ("w1", "w3", "g3", "d3", "c1", "c3", "mm", "s", "b", "m", "var", "k", "slope")


def lines(rng: random.Random, length: int, opset: int) -> Iterator[str]:
    """Nodes in text; the last value is `y`."""
    values = ["x"]
    choices = [*NODES, *(text for least, text in NEWER if least <= opset)]
    for at in range(length):
        y = "y" if at == length - 1 else f"v{at}"
        norm = rng.random() < 0.3
        text = NODES[6] if norm else rng.choice(choices)
        slots = {name: f"{name}{rng.choice('xz')}" for name in SLOTS}
        near = values[-1] if rng.random() < 0.7 else rng.choice(values)
        far = rng.choice(values)
        made = text.format(y=y, **slots)
        made = re.sub(r"(?<=[(, ])a(?=[,)])", near, made)
        made = re.sub(r"(?<=[(, ])c(?=[,)])", far, made)
        yield made.replace("(k,", f"({slots['k']},")
        values.append(y)


def disguised(model: onnx.ModelProto, rng: random.Random) -> None:
    """Some weights come from nodes, some may be overridden, some are outputs."""
    graph, kept = model.graph, []
    for tensor in list(graph.initializer):
        name, way = tensor.name, rng.random()
        if way < 0.15:
            graph.node.insert(0, onnx.helper.make_node("Constant", [], [name], value=tensor))
        elif way < 0.25:
            tensor.name = f"{name}_stored"
            graph.node.insert(0, onnx.helper.make_node("Identity", [tensor.name], [name]))
            kept.append(tensor)
        else:
            kept.append(tensor)
            value = onnx.helper.make_tensor_value_info(name, tensor.data_type, tensor.dims)
            if way < 0.28:
                graph.input.append(value)
            elif way < 0.3:
                graph.output.append(value)
    del graph.initializer[:]
    graph.initializer.extend(kept)


def check(seed: int, opset: int, length: int, *, thresholds: bool) -> str:
    """A random file folds to what computes the same; the text of a fault, "" for none."""
    rng = random.Random(seed)
    text = "\n".join(lines(rng, length, opset))
    inner = [name for name in (f"v{at}" for at in range(length - 1)) if f"{name} = " in text]
    outputs = " ".join(["y", *rng.sample(inner, min(len(inner), rng.choice((0, 0, 1))))])
    words = set(re.findall(r"\w+", text))
    used = {name: value for name, value in WEIGHTS.items() if name in words}
    old = opset < 9
    model = graph(
        text, used, x=(2, 4, 6, 6), outputs=outputs, opset=opset, ir_version=3 if old else 8
    )
    for value in model.graph.output:  # where onnx cannot infer it
        if not value.type.tensor_type.HasField("shape"):
            for size in (2, 4, 6, 6):
                value.type.tensor_type.shape.dim.add(dim_value=size)
    if not old and rng.random() < 0.5:
        disguised(model, rng)
    with tempfile.TemporaryDirectory() as name:
        source, out = saved(model, Path(name)), Path(name) / "out.onnx"
        feed = feed_of(model)
        truth = run(source, feed)
        done = bnfx.fold_onnx(source, out, verify=False, thresholds=thresholds and opset > 7)
        onnx.checker.check_model(str(out), full_check=True)
        ours = run(out, feed)
        kept = sum(r.verdict != "folded" for r in done.batch_norms)
        inside = sum(n.op_type == "BatchNormalization" for n in all_nodes(onnx.load(str(out))))
        assert inside <= kept, (inside, kept)  # fewer where a subgraph has gone
    for output, value in truth.items():
        if not distance(ours[output], value) < 1e-4:
            return f"opset {opset}, output {output}: {distance(ours[output], value)}\n{text}"
    return ""


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10**6), st.integers(7, NEWEST), st.integers(3, 10), st.booleans())
def test_random_files(seed: int, opset: int, length: int, thresholds: bool) -> None:  # noqa: FBT001  # drawn
    assert not check(seed, opset, length, thresholds=thresholds)
