"""Random files of every opset: folded, they compute what they did."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bnfx
from tests.support.onnx_graphs import Weights, count, distance, feed_of, graph, ints, run, saved

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
    "wide": (4, 8, 1, 1),
    "flat": ints(0, 0, -1),
    "back": ints(0, -1, 6, 6),
    "turned": ints(2, 0, 3, 1),
}


def lines(rng: random.Random, length: int) -> Iterator[str]:
    """Nodes in text; the last value is `y`."""
    values = ["x"]
    for at in range(length):
        y = "y" if at == length - 1 else f"v{at}"
        norm = rng.random() < 0.3
        text = NODES[6] if norm else rng.choice(NODES)
        slots = {name: f"{name}{rng.choice('xz')}" for name in
                 ("w1", "w3", "g3", "s", "b", "m", "var", "k", "slope")}  # fmt: skip
        near = values[-1] if rng.random() < 0.7 else rng.choice(values)
        made = text.format(y=y, **slots)
        made = made.replace("(a", f"({near}").replace(" a)", f" {near})")
        yield made.replace("(k,", f"({slots['k']},").replace(" c)", f" {rng.choice(values)})")
        values.append(y)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10**6), st.integers(7, NEWEST), st.integers(3, 10), st.booleans())
def test_random_files(seed: int, opset: int, length: int, thresholds: bool) -> None:  # noqa: FBT001  # drawn
    rng = random.Random(seed)
    nodes = list(lines(rng, length))
    inner = [f"v{at}" for at in range(length - 1)]
    outputs = " ".join(["y", *rng.sample(inner, min(len(inner), rng.choice((0, 0, 1))))])
    text = "\n".join(nodes)
    used = {name: value for name, value in WEIGHTS.items() if name in text}
    old = opset < 9
    model = graph(
        text, used, x=(2, 4, 6, 6), outputs=outputs, opset=opset, ir_version=3 if old else 8
    )
    with tempfile.TemporaryDirectory() as name:
        source, out = saved(model, Path(name)), Path(name) / "out.onnx"
        done = bnfx.fold_onnx(source, out, verify=False, thresholds=thresholds and opset > 7)
        onnx.checker.check_model(str(out), full_check=True)
        feed = feed_of(model)
        truth, ours = run(source, feed), run(out, feed)
        assert count(out) == sum(record.verdict != "folded" for record in done.batch_norms)
    for output, value in truth.items():
        assert distance(ours[output], value) < 1e-4, f"opset {opset}:\n{text}"
