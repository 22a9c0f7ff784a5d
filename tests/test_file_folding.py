"""`fold_onnx`: files fold like models, and stay the files that they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import bnfx
from tests.support.onnx_graphs import Weights, count, distance, feed_of, fold, graph, run, saved

W = (4, 3, 3, 3)
NORM: Weights = {"s": (4,), "b": (4,), "mean": (4,), "var": (4,)}
NODE = "BatchNormalization(h, s, b, mean, var)"


FOLDS: dict[str, tuple[str, Weights]] = {
    "behind a convolution": (f"h = Conv(x, w)\ny = {NODE}", {"w": W}),
    "behind one with a bias": (f"h = Conv(x, w, c)\ny = {NODE}", {"w": W, "c": (4,)}),
    "behind a transposed one": (f"h = ConvTranspose(x, w)\ny = {NODE}", {"w": (3, 4, 3, 3)}),
    "behind a crop": (
        f"h = ConvTranspose<pads=[0, 0, 1, 1], strides=[2, 2]>(x, w)\ny = {NODE}",
        {"w": (3, 4, 3, 3)},
    ),
    "behind uneven pads": (f"h = Conv<pads=[0, 1, 1, 1]>(x, w)\ny = {NODE}", {"w": W}),
    "behind upper": (
        f'h = Conv<auto_pad="SAME_UPPER", strides=[2, 2]>(x, w)\ny = {NODE}',
        {"w": W},
    ),
    "behind a sum": (
        "a = Conv(x, w)\nc = Conv(x, v)\nd = Relu(a)\ne = Conv(d, u)\n"
        f"g = Conv<kernel_shape=[3, 3]>(c, u2)\nh = Add(e, g)\ny = {NODE}",
        {"w": W, "v": W, "u": (4, 4, 3, 3), "u2": (4, 4, 3, 3)},
    ),
    "before a convolution": (
        "i = BatchNormalization(x, s, b, mean, var)\ny = Conv(i, w)",
        {"w": W, "s": (3,), "b": (3,), "mean": (3,), "var": (3,)},
    ),
    "behind a pool": (
        f"g = Conv(x, w)\nh = AveragePool<kernel_shape=[2, 2]>(g)\ny = {NODE}",
        {"w": W},
    ),
    "behind what moves": (
        f"g = Conv(x, w)\nq = Transpose<perm=[0, 2, 3, 1]>(g)\nh = Transpose<perm=[0, 3, 1, 2]>(q)"
        f"\ny = {NODE}",
        {"w": W},
    ),
    "into a transposed weight": (f"v = Identity(w)\nh = Conv(x, v)\ny = {NODE}", {"w": W}),
}


@pytest.mark.parametrize("opset", [9, 13, 17])
@pytest.mark.parametrize("name", FOLDS)
def test_folds(name: str, opset: int, tmp_path: Path) -> None:
    nodes, weights = FOLDS[name]
    model = graph(nodes, {**NORM, **weights}, opset=opset, ir_version=3 if opset == 9 else 8)
    done = fold(model, tmp_path)
    assert [record.verdict for record in done.batch_norms] == ["folded"]
    assert count(tmp_path / "out.onnx") == 0
    assert count(tmp_path / "out.onnx", "Identity") == 0


@pytest.mark.parametrize(
    ("nodes", "weights"),
    [
        ("h = Gemm(x, w)", {"w": (6, 4)}),
        ("h = Gemm<transB=1, alpha=0.5, beta=2.0>(x, w, c)", {"w": (4, 6), "c": (1, 4)}),
        ("h = Gemm<beta=0.5>(x, w, c)", {"w": (6, 4), "c": ()}),
        ("h = MatMul(x, w)", {"w": (6, 4)}),
        ("g = MatMul(x, w)\nh = Add(g, c)", {"w": (6, 4), "c": (4,)}),
        ("g = MatMul(x, w)\nh = Add(c, g)", {"w": (6, 4), "c": (4,)}),
        ("g = MatMul(x, w)\nh = Add(g, c)", {"w": (6, 4), "c": (1, 4)}),
    ],
)
def test_folds_into_products(nodes: str, weights: Weights, tmp_path: Path) -> None:
    model = graph(f"{nodes}\ny = {NODE}", {**NORM, **weights}, x=("n", 6))
    source, out = saved(model, tmp_path), tmp_path / "out.onnx"
    assert bnfx.fold_onnx(source, out)
    assert count(out) == 0
    assert len(onnx.load(str(out)).graph.node) <= 2


@pytest.mark.parametrize(
    "nodes",
    [
        "i = Mul(h, s4)\ny = Add(i, b4)",
        "i = Sub(h, mean4)\nj = Div(i, var4)\nk = Mul(j, s4)\ny = Add(b4, k)",
        "v = Sqrt(var4)\nr = Div(s4, v)\ni = Mul(h, r)\nm = Mul(mean4, r)\nt = Sub(b4, m)\n"
        "y = Add(i, t)",
    ],
)
def test_norms_written_as_arithmetic_fold(nodes: str, tmp_path: Path) -> None:
    four: Weights = {f"{name}4": (4, 1, 1) for name in ("s", "b", "mean", "var")}
    fold(graph(f"h = Conv(x, w)\n{nodes}", {"w": W, **four}), tmp_path)
    assert [n.op_type for n in onnx.load(str(tmp_path / "out.onnx")).graph.node] == ["Conv"]


def test_branches_become_one_node(tmp_path: Path) -> None:
    nodes = (
        "a = Conv<pads=[1, 1, 1, 1]>(x, w)\nc = Conv(x, v)\n"
        "e = BatchNormalization(a, s, b, mean, var)\ng = BatchNormalization(c, s, b, mean, var)\n"
        "i = BatchNormalization(x, s, b, mean, var)\nj = Add(e, g)\nk = Add(j, i)\ny = Relu(k)"
    )
    three: Weights = dict.fromkeys(NORM, (3,))
    model = graph(nodes, {"w": (3, 3, 3, 3), "v": (3, 3, 1, 1), **three})
    done = fold(model, tmp_path)
    assert len(done.batch_norms) == 3
    assert [n.op_type for n in onnx.load(str(tmp_path / "out.onnx")).graph.node] == ["Conv", "Relu"]
    fold(model, tmp_path, merge_branches=False)
    assert count(tmp_path / "out.onnx", "Conv") == 2


def test_thresholds_and_border_maps(tmp_path: Path) -> None:
    nodes = (
        "a = Conv(x, w)\nh = Relu(a)\n"
        f"c = {NODE}\ny = Conv<pads=[1, 1, 1, 1]>(c, v)\nz = Sigmoid(c)"
    )
    model = graph(nodes, {**NORM, "w": W, "v": (2, 4, 3, 3)})
    kept = fold(model, tmp_path)
    assert kept.batch_norms[0].reason
    source, out = saved(model, tmp_path), tmp_path / "out.onnx"
    assert bnfx.fold_onnx(source, out, thresholds=True)
    assert count(out) == 0
    assert count(out, "Max") == 1


def test_border_maps_need_sizes(tmp_path: Path) -> None:
    nodes = "h = BatchNormalization(x, s, b, mean, var)\ny = Conv<pads=[1, 1, 1, 1]>(h, w)"
    weights: Weights = {"w": W, "s": (3,), "b": (3,), "mean": (3,), "var": (3,)}
    out = tmp_path / "out.onnx"
    fixed = graph(nodes, weights)
    assert bnfx.fold_onnx(saved(fixed, tmp_path), out, border_maps=True)
    assert count(out) == 0
    source = saved(graph(nodes, weights, x=("n", 3, "h", "w")), tmp_path)
    with pytest.raises(bnfx.FoldError, match="pass args"):
        bnfx.fold_onnx(source, out, border_maps=True)


FOUR: Weights = {f"{name}4": (4, 1, 1) for name in ("s", "b", "mean", "var")}


@pytest.mark.parametrize(
    "nodes",
    [
        "h = Conv(x, w)\nk = Mul(h, s4)\ny = Add(k, b4)",
        "a = Conv<pads=[1, 1, 1, 1]>(x, w)\nc = Conv(x, v)\ny = Add(a, c)",
        "h = Conv(x, w)\ni = Mul(h, s4)\nk = Relu(i)\nl = Conv(k, u)\ny = Sub(l, b4)",
        "h = Conv(x, w)\ni = Mul(h, near)\nk = Relu(i)\ny = Conv(k, u)",
    ],
)
def test_files_without_batch_normalization_verify(nodes: str, tmp_path: Path) -> None:
    """Other weights are meant; a wrong one is found all the same."""
    near = np.full((4, 1, 1), 1.001)
    weights = {"w": W, "v": (4, 3, 1, 1), "u": (4, 4, 3, 3), "near": near, **FOUR}
    used = {name: weights[name] for name in weights if name in nodes}
    source, out = saved(graph(nodes, used), tmp_path), tmp_path / "out.onnx"
    done = bnfx.fold_onnx(source, out, verify_options={"isolate": False})
    assert done, str(done)
    assert done.changed
    written = onnx.load(str(out))
    stored = next(t for t in written.graph.initializer if t.name in done.changed)
    wrong = onnx.numpy_helper.to_array(stored).copy()
    wrong[0] *= 1.001
    stored.CopyFrom(onnx.numpy_helper.from_array(wrong, stored.name))
    onnx.save(written, str(out))
    again = bnfx.verify_onnx(source, out, rewritten=done.changed, isolate=False)
    assert again.status == "failed", str(again)


@pytest.mark.parametrize("beside", [False, True])
def test_large_weights_fold(beside: bool, tmp_path: Path) -> None:  # noqa: FBT001  # a parameter of the test
    """Large ones lie in files while they are folded."""
    nodes = (
        "h = Conv(x, w)\ni = BatchNormalization(h, s, b, mean, var)\nj = Relu(i)\n"
        "k = Flatten(j)\nl = MatMul(k, v)\nm = Mul(l, r)\ny = Add(m, r)"
    )
    weights: Weights = {"w": (512, 64, 3, 3), **dict.fromkeys(NORM, (512,))}
    weights |= {"v": (512, 1024), "r": (1024,)}
    model = graph(nodes, weights, x=("n", 64, 3, 3))
    source, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    onnx.save(model, str(source), save_as_external_data=beside, location="model.data")
    done = bnfx.fold_onnx(source, out, verify=False)
    assert {"w", "v"} <= set(done.changed)
    feed = feed_of(model)
    assert distance(run(out, feed)["y"], run(source, feed)["y"]) < 1e-5
    assert beside == any(
        path.suffix == ".data" and "out" in path.name for path in tmp_path.iterdir()
    )


@pytest.mark.parametrize("norm", [False, True])
def test_what_nothing_changes_needs_no_proof(norm: bool, tmp_path: Path) -> None:  # noqa: FBT001  # a parameter of the test
    """Numbers at random can't be compared: with a change, nothing is written."""
    nodes = "n = RandomNormalLike(x)\ni = Conv(x, w)\n"
    nodes += f"h = Identity(i)\nj = {NODE}\n" if norm else "j = Relu(i)\n"
    nodes += "y = Concat<axis=1>(j, n)"
    used = {"w": W, **NORM} if norm else {"w": W}
    source, out = saved(graph(nodes, used), tmp_path), tmp_path / "out.onnx"
    if norm:
        with pytest.raises(bnfx.VerificationError, match="verify=False"):
            bnfx.fold_onnx(source, out, verify_options={"isolate": False})
        assert not out.exists()
        return
    done = bnfx.fold_onnx(source, out, verify_options={"isolate": False})
    assert not done
    assert done.verification is None
    assert list(onnx.load(str(out)).graph.node) == list(onnx.load(str(source)).graph.node)
