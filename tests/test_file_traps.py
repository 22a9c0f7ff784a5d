"""Traps for whoever folds files: what is left computes the same, whatever stands in the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import bnfx
from tests.support.onnx_graphs import (
    Weights,
    count,
    distance,
    feed_of,
    fold,
    graph,
    ints,
    run,
    saved,
)

W, V = (4, 3, 3, 3), (4, 4, 3, 3)
NORM: Weights = {"s": (4,), "b": (4,), "mean": (4,), "var": (4,)}
FIRST: Weights = {"s1": (3,), "b1": (3,), "mean1": (3,), "var1": (3,)}
NODE = "BatchNormalization(h, s, b, mean, var)"
#: Of the input, whose channels are three.
BEFORE = "BatchNormalization(x, s1, b1, mean1, var1)"

#: Name -> nodes, weights, outputs, how many BatchNormalizations go.
TRAPS: dict[str, tuple[str, Weights, str, int]] = {
    "a norm whose output is an output": (f"h = Conv(x, w)\ny = {NODE}\nz = Relu(y)", {}, "y z", 1),
    "its input is an output": (f"h = Conv(x, w)\ny = {NODE}", {}, "y h", 0),
    "its weight is an output": (f"h = Conv(x, w)\ny = {NODE}", {}, "y w", 1),
    "its gamma is an output": (f"h = Conv(x, w)\ny = {NODE}", {}, "y s", 1),
    "one value is two outputs": (f"h = Conv(x, w)\ny = {NODE}\nz = Identity(y)", {}, "y z", 1),
    "a convolution read twice": (f"h = Conv(x, w)\ny = {NODE}\nz = Sigmoid(h)", {}, "y z", 0),
    "read twice by sums": (f"h = Conv(x, w)\ng = {NODE}\ny = Add(g, h)", {}, "y", 0),
    "two norms on one": (
        f"h = Conv(x, w)\ny = {NODE}\nz = BatchNormalization(h, b, s, mean, var)",
        {},
        "y z",
        1,
    ),
    "two layers share a weight": (
        f"h = Conv(x, w)\ny = {NODE}\nz = Conv<strides=[2, 2]>(x, w)",
        {},
        "y z",
        1,
    ),
    "two layers share it and want the same": (
        f"h = Conv(x, w)\ny = {NODE}\ni = Conv(x, w)\nz = BatchNormalization(i, s, b, mean, var)",
        {},
        "y z",
        2,
    ),
    "two layers share a bias": (
        f"h = Conv(x, w, c)\ny = {NODE}\nz = Conv<strides=[2, 2]>(x, w, c)",
        {"c": (4,)},
        "y z",
        1,
    ),
    "a bias that is its beta": (f"h = Conv(x, w, b)\ny = {NODE}", {}, "y", 1),
    "a weight that a subgraph's sibling computes with": (
        f"h = Conv(x, w)\ni = {NODE}\ng = ReduceSum<keepdims=0>(w)\ny = Mul(i, g)",
        {},
        "y",
        1,
    ),
    "same upper": (
        f'h = Conv<auto_pad="SAME_UPPER", strides=[2, 2]>(x, w)\ny = {NODE}',
        {},
        "y",
        1,
    ),
    "same lower behind": (
        f'g = {BEFORE}\ny = Conv<auto_pad="SAME_LOWER", strides=[2, 2]>(g, w)',
        FIRST,
        "y",
        0,
    ),
    "valid behind": (f'g = {BEFORE}\ny = Conv<auto_pad="VALID">(g, w)', FIRST, "y", 1),
    "ceil mode": (
        "g = Conv(x, w)\nh = AveragePool<kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1>(g)\n"
        f"y = {NODE}",
        {},
        "y",
        1,
    ),
    "padded average": (
        "g = Conv(x, w)\nh = AveragePool<kernel_shape=[3, 3], pads=[1, 1, 1, 1], "
        f"count_include_pad=1>(g)\ny = {NODE}",
        {},
        "y",
        0,
    ),
    "dilated, in groups": (
        f"h = Conv<dilations=[2, 2], group=3>(x, w)\ny = {NODE}",
        {"w": (6, 1, 3, 3), "s": (6,), "b": (6,), "mean": (6,), "var": (6,)},
        "y",
        1,
    ),
    "transposed, in groups": (
        f"h = ConvTranspose<group=3>(x, w)\ny = {NODE}",
        {"w": (3, 2, 3, 3), "s": (6,), "b": (6,), "mean": (6,), "var": (6,)},
        "y",
        1,
    ),
    "a zero that means nothing": (
        f"h = Conv(x, w)\ng = {NODE}\ny = Reshape<allowzero=1>(g, shape)",
        {"shape": ints(2, 4, 36)},
        "y",
        1,
    ),
    "a zero that means the same": (
        f"g = Conv(x, w)\ni = Reshape(g, shape)\nh = Reshape(i, back)\ny = {NODE}",
        {"shape": ints(0, 0, -1), "back": ints(0, 0, 6, -1)},
        "y",
        1,
    ),
    "axes from behind": (
        f"g = Conv(x, w)\ni = Unsqueeze(g, at)\nh = Squeeze(i, at)\ny = {NODE}",
        {"at": ints(-1)},
        "y",
        1,
    ),
    "a channel axis from behind": (
        f"g = Conv(x, w)\nh = Concat<axis=-3>(g, g)\ny = {NODE}",
        {"s": (8,), "b": (8,), "mean": (8,), "var": (8,)},
        "y",
        0,
    ),
    "a scale without axes": (f"g = Conv(x, w)\nh = Mul(g, k)\ny = {NODE}", {"k": ()}, "y", 1),
    "a summand without axes": (f"g = Conv(x, w)\nh = Add(k, g)\ny = {NODE}", {"k": ()}, "y", 1),
    "an optional input left out": (
        f'g = Conv(x, w, "")\nh = Clip(g, "", most)\ny = {NODE}',
        {"most": np.array(np.finfo(np.float32).max)},
        "y",
        1,
    ),
    "statistics of one": (
        f"h = Conv(x, w)\ny = {NODE}",
        {"w": (1, 3, 3, 3), "s": (1,), "b": (1,), "mean": (1,), "var": (1,)},
        "y",
        1,
    ),
    "a gamma of zero": (
        f"h = Conv(x, w)\ny = {NODE}",
        {"s": np.array([0.0, 1.0, -1.0, 0.5])},
        "y",
        1,
    ),
}


def trap(name: str, opset: int, ir_version: int = 8) -> onnx.ModelProto:
    """The file of a trap."""
    nodes, more, outputs, _ = TRAPS[name]
    weights = {"w": W, **NORM, **more}
    used = {key: value for key, value in weights.items() if key in nodes + outputs}
    text = nodes.replace(', ""', ", ").replace('"",', ",")
    made = graph(text, used, outputs=outputs, opset=opset, ir_version=ir_version)
    stored = {tensor.name: list(tensor.dims) for tensor in made.graph.initializer}
    for value in made.graph.output:
        if value.name in stored:
            value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, 1, stored[value.name]))
    return onnx.shape_inference.infer_shapes(made)


@pytest.mark.parametrize(("opset", "ir_version"), [(13, 3), (18, 8)])
@pytest.mark.parametrize("name", TRAPS)
def test_traps(name: str, opset: int, ir_version: int, tmp_path: Path) -> None:
    if "nothing" in name and opset < 14:
        pytest.skip("allowzero came with 14")
    done = fold(trap(name, opset, ir_version), tmp_path)
    assert sum(record.verdict == "folded" for record in done.batch_norms) == TRAPS[name][3]
    assert all(record.reason for record in done.batch_norms if record.verdict != "folded")


def test_nodes_of_one_name_keep_it(tmp_path: Path) -> None:
    """Valid ONNX, though onnxruntime refuses it."""
    nodes = f"h = Conv(x, w)\ng = {NODE}\nk = Conv(g, v)\ny = Relu(k)"
    model = graph(nodes, {"w": W, "v": V, **NORM})
    feed, truth = feed_of(model), run(model, feed_of(model))
    for node in model.graph.node:
        node.name = "layer"
    done = bnfx.fold_onnx(saved(model, tmp_path), tmp_path / "out.onnx", verify=False)
    assert [record.verdict for record in done.batch_norms] == ["folded"]
    written = onnx.load(str(tmp_path / "out.onnx"))
    assert {node.name for node in written.graph.node} == {"layer"}
    for at, node in enumerate(written.graph.node):
        node.name = f"layer {at}"
    assert distance(run(written, feed)["y"], truth["y"]) < 1e-5


@pytest.mark.parametrize("lie", [(2, 9, 6, 6), (7,), None])
def test_shapes_that_lie_are_not_believed(lie: tuple[int, ...] | None, tmp_path: Path) -> None:
    model = graph(f"h = Conv(x, w)\ng = Flatten(h)\ny = MatMul(g, m)\nz = {NODE}",
                  {"w": W, "m": (144, 5), **NORM}, outputs="y z")  # fmt: skip
    del model.graph.value_info[:]
    for name in "hg":
        model.graph.value_info.append(onnx.helper.make_tensor_value_info(name, 1, lie))
    source, out = saved(model, tmp_path), tmp_path / "out.onnx"
    done = bnfx.fold_onnx(source, out, verify=False)
    truth = onnx.load(str(source))
    for m in (truth, written := onnx.load(str(out))):
        del m.graph.value_info[:]
    feed = feed_of(truth)
    for name, value in run(truth, feed).items():
        assert distance(run(written, feed)[name], value) < 1e-5, name
    assert len(done.batch_norms) == 1


def test_what_may_be_overridden_stays(tmp_path: Path) -> None:
    """Since IR version 4 an initializer that is an input too is a default."""
    model = graph(f"h = Conv(x, w)\ny = {NODE}", {"w": W, **NORM})
    model.graph.input.append(onnx.helper.make_tensor_value_info("s", 1, (4,)))
    source, out = saved(model, tmp_path), tmp_path / "out.onnx"
    done = bnfx.fold_onnx(source, out, verify=False)
    assert [record.verdict for record in done.batch_norms] == ["kept"]
    assert "'s' is an input of the file" in done.batch_norms[0].reason
    feed = feed_of(model) | {"s": np.arange(4, dtype=np.float32)}
    assert distance(run(out, feed)["y"], run(source, feed)["y"]) < 1e-6


def test_defaults_may_be_fixed(tmp_path: Path) -> None:
    """PyTorch 1.2 lists all weights as inputs, with IR version 4."""
    model = graph(f"h = Conv(x, w)\ny = {NODE}", {"w": W, **NORM}, ir_version=4, opset=9)
    for name, shape in {"w": W, **NORM}.items():
        model.graph.input.append(onnx.helper.make_tensor_value_info(name, 1, shape))
    source, out = saved(model, tmp_path), tmp_path / "out.onnx"
    assert bnfx.fold_onnx(source, out).folded == 0
    done = bnfx.fold_onnx(source, out, fix_defaults=True)
    assert done
    assert done.folded == 1
    assert [value.name for value in onnx.load(str(out)).graph.input] == ["x"]


def test_a_default_that_nothing_reads_any_more_stays(tmp_path: Path) -> None:
    """Without it, the file would want a value that it did not want before."""
    model = graph(f"h = Conv(x, w)\ny = {NODE}\nz = Mul(h, k)", {"w": W, "k": (), **NORM})
    model.graph.input.append(onnx.helper.make_tensor_value_info("k", 1, ()))
    source, out = saved(model, tmp_path), tmp_path / "out.onnx"
    for args in (None, np.zeros((2, 3, 8, 8), np.float32)):
        assert bnfx.fold_onnx(source, out, args=args)
    assert distance(run(out, feed_of(model))["y"], run(source, feed_of(model))["y"]) < 1e-5
    assert [value.name for value in onnx.load(str(out)).graph.input] == ["x", "k"]


def test_a_norm_that_goes_with_what_nothing_reads_is_told(tmp_path: Path) -> None:
    model = graph(f"h = Conv(x, w)\nz = {NODE}\ny = Relu(h)", {"w": W, **NORM})
    model.graph.input.append(onnx.helper.make_tensor_value_info("s", 1, (4,)))
    done = bnfx.fold_onnx(saved(model, tmp_path), tmp_path / "out.onnx", max_batch_norms_left=0)
    (record,) = done.batch_norms
    assert (record.verdict, record.reason) == ("folded", "nothing reads its output")
    assert count(tmp_path / "out.onnx") == 0


def test_a_state_of_one_row_beside_an_open_batch(tmp_path: Path) -> None:
    """As files that read a stream have it: other batches do not run."""
    nodes = f"h = Conv(x, w)\ng = {NODE}\np = GlobalAveragePool(g)\nq = Squeeze(p, ends)\n" \
        "r = Unsqueeze(q, front)\ny, z = GRU<hidden_size=2>(r, v, u, , , state)"  # fmt: skip
    weights: Weights = {"w": W, "v": (1, 6, 4), "u": (1, 6, 2), "ends": ints(2, 3), **NORM}
    model = graph(nodes, weights | {"front": ints(0)}, x=("N", 3, 8, 8))
    model.graph.input.append(onnx.helper.make_tensor_value_info("state", 1, (1, 1, 2)))
    done = bnfx.fold_onnx(saved(model, tmp_path), tmp_path / "out.onnx")
    assert done
    assert done.folded == 1


def test_reasons_name_inputs_as_the_file_does(tmp_path: Path) -> None:
    done = bnfx.fold_onnx(saved(graph(f"y = {BEFORE}", FIRST), tmp_path), tmp_path / "out.onnx")
    assert "input 'x'" in done.batch_norms[0].reason


def test_a_scale_for_each_place_is_verified(tmp_path: Path) -> None:
    node = NODE.replace("(", "<spatial=0>(", 1)
    shapes: Weights = {"w": W, **dict.fromkeys(NORM, (4, 6, 6))}
    source = saved(graph(f"h = Conv(x, w)\ny = {node}", shapes, opset=7), tmp_path)
    assert bnfx.verify_onnx(source, source, isolate=False)


def test_the_standard_operators_by_their_other_name(tmp_path: Path) -> None:
    model = graph(f"h = Conv(x, w)\ny = {NODE}", {"w": W, **NORM})
    model.opset_import[0].domain = "ai.onnx"
    assert bnfx.fold_onnx(saved(model, tmp_path), tmp_path / "out.onnx")


def test_files_that_no_runtime_takes_are_refused_in_words(tmp_path: Path) -> None:
    nodes, out = f"h = Conv(x, w)\ny = {NODE}", tmp_path / "out.onnx"
    short = graph(nodes, {"w": W, **NORM, "s": (3,)})
    done = bnfx.fold_onnx(saved(short, tmp_path), out, verify=False)
    assert "do not belong together" in done.batch_norms[0].reason
    large = graph(nodes, {"w": W, **NORM}, x=(1, 3, 10**5, 10**5))
    with pytest.raises(bnfx.FoldError, match="no example can be drawn"):
        bnfx.fold_onnx(saved(large, tmp_path), out)
    other = graph(nodes, {"w": W, **NORM})  # before opset 22 Conv takes no bfloat16
    for tensor in other.graph.initializer:
        flat = onnx.numpy_helper.to_array(tensor).reshape(-1).tolist()
        kind = onnx.TensorProto.BFLOAT16
        tensor.CopyFrom(onnx.helper.make_tensor(tensor.name, kind, tensor.dims, flat))
    for value in (*other.graph.input, *other.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.BFLOAT16
    del other.graph.value_info[:]
    bnfx.fold_onnx(saved(other, tmp_path), out, verify=False)


@pytest.mark.parametrize("kind", ["Unsqueeze", "Reshape", "AveragePool", "Conv", "Gemm", "Clip"])
def test_nodes_that_nobody_can_run_stay(kind: str, tmp_path: Path) -> None:
    """They lack what their operator needs; what lies before them folds."""
    model = graph(f"h = Conv(x, w)\ng = {NODE}\ny = Relu(g)", {"w": W, **NORM})
    model.graph.node[-1].op_type = kind
    done = bnfx.fold_onnx(saved(model, tmp_path), tmp_path / "out.onnx", verify=False)
    assert len(done.batch_norms) == 1
    assert onnx.load(str(tmp_path / "out.onnx")).graph.node[-1].op_type == kind


def test_subgraphs_keep_what_they_read(tmp_path: Path) -> None:
    model = graph(f"h = Conv(x, w)\ny = {NODE}\nz = Relu(h)", {"w": W, **NORM}, outputs="y z")
    del model.graph.node[2:]
    value = onnx.helper.make_tensor_value_info
    branches = {
        key: onnx.helper.make_graph(
            [onnx.helper.make_node(kind, ["h", *more], [f"{key}_out"])],
            key,
            [],
            [value(f"{key}_out", 1, None)],
        )
        for key, kind, more in (
            ("then_branch", "Relu", ()),
            ("else_branch", "Conv", ("w2",)),
        )
    }
    model.graph.initializer.append(
        onnx.numpy_helper.from_array(np.ones((4, 4, 1, 1), np.float32), "w2")
    )
    yes = onnx.numpy_helper.from_array(np.array(True), "yes")
    model.graph.initializer.append(yes)
    model.graph.node.append(onnx.helper.make_node("If", ["yes"], ["z"], **branches))
    source, out = saved(model, tmp_path), tmp_path / "out.onnx"
    bnfx.fold_onnx(source, out, verify=False)
    feed = feed_of(model)
    for name, truth in run(source, feed).items():
        assert distance(run(out, feed)[name], truth) < 1e-5, name


@pytest.mark.parametrize(
    ("attributes", "opset", "why"),
    [
        ("<spatial=0>", 7, "spatial=0"),
        ("<training_mode=1>", 15, "training_mode=1"),
    ],
)
def test_norms_of_training_stay(attributes: str, opset: int, why: str, tmp_path: Path) -> None:
    shape = (4, 6, 6) if "spatial" in attributes else (4,)
    node = NODE.replace("(", f"{attributes}(", 1)
    model = graph(
        f"h = Conv(x, w)\ny = {node}", {"w": W, **dict.fromkeys(NORM, shape)}, opset=opset
    )
    if "training" in attributes:
        model.graph.node[1].output.extend(["m2", "v2"])
    done = bnfx.fold_onnx(saved(model, tmp_path), tmp_path / "out.onnx", verify=False)
    (record,) = done.batch_norms
    assert record.verdict == "kept"
    assert why in record.reason
    assert count(tmp_path / "out.onnx") == 1


def test_quantised_regions_stay(tmp_path: Path) -> None:
    nodes = (
        "q = QuantizeLinear(x, k, zero)\nr = DequantizeLinear(q, k, zero)\n"
        f"v = DequantizeLinear(wq, k, zero)\nh = Conv(r, v)\ng = {NODE}\n"
        "p = QuantizeLinear(g, k, zero)\ny = DequantizeLinear(p, k, zero)"
    )
    wq = np.random.default_rng(0).integers(-99, 99, W).astype(np.int8)
    weights: Weights = {"k": np.array(0.1), "zero": np.array(0, np.int8), "wq": wq, **NORM}
    done = fold(graph(nodes, weights, opset=13), tmp_path)
    (record,) = done.batch_norms
    assert record.verdict == "kept"
    assert record.reason
    assert not done.changed
