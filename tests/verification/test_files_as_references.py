"""Files against files: what decides where the reference has BatchNorms; what is not compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import bnfx
from tests.support.laws import randomise


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.a_bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.b, self.b_bn = nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a_bn(self.a(x)))
        return torch.relu(self.b_bn(self.b(y)))


def scaled(proto: onnx.ModelProto, name: str, edit: Callable[[np.ndarray], None]) -> None:
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    array = numpy_helper.to_array(tensor).copy()
    edit(array)
    tensor.CopyFrom(numpy_helper.from_array(array, name))


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A file with its two BatchNorms, and one in which they are folded."""
    model, x = randomise(Chain()), torch.randn(1, 3, 9, 9)
    unfolded, folded = tmp_path / "unfolded.onnx", tmp_path / "folded.onnx"
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False, optimize=False)
    assert program is not None
    program.save(unfolded)
    bnfx.export_onnx(bnfx.fold_bn(model, x), x, folded)
    return unfolded, folded


def test_a_wrong_weight_decides(files: tuple[Path, Path]) -> None:
    unfolded, folded = files
    right = bnfx.verify_onnx(unfolded, folded, isolate=False)
    assert right, str(right)
    assert (right.tiers[0].decides, right.tiers[0].checked, right.tiers[0].of) == (True, 4, 4)
    proto = onnx.load(folded)

    def slightly(array: np.ndarray) -> None:
        array[2] *= 1 + 1e-5

    scaled(proto, "a.weight", slightly)
    onnx.save(proto, folded)
    report = bnfx.verify_onnx(unfolded, folded, isolate=False, max_ratio=1e6)
    assert not report, "no output shows it"
    assert report.divergence is not None
    assert (report.divergence.tier, report.divergence.channel) == ("weights", 2)


def test_weights_that_undo_each_other_are_no_fault(files: tuple[Path, Path]) -> None:
    unfolded, folded = files
    proto = onnx.load(folded)

    def double(array: np.ndarray) -> None:
        array[2] *= 2

    def halve(array: np.ndarray) -> None:
        array[:, 2] /= 2

    for name, edit in (("a.weight", double), ("a.bias", double), ("b.weight", halve)):
        scaled(proto, name, edit)
    del proto.metadata_props[:]
    onnx.save(proto, folded)
    report = bnfx.verify_onnx(unfolded, folded, isolate=False)
    assert report, str(report)
    assert not report.tiers[0].decides
    assert report.tiers[0].status == "failed", "told, and not decided by"
    assert any("outputs decide" in note for note in report.notes)


def conditional(weight: np.ndarray) -> onnx.ModelProto:
    """The product x W, then W again inside the branches of an If on the sign of the sum."""

    def branch(name: str, factor: float) -> onnx.GraphProto:
        tensor = numpy_helper.from_array(weight * np.float32(factor), f"{name}.weight")
        node = helper.make_node("MatMul", ["h", f"{name}.weight"], [f"{name}.out"])
        out = helper.make_tensor_value_info(f"{name}.out", TensorProto.FLOAT, None)
        return helper.make_graph([node], name, [], [out], [tensor])

    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("ReduceSum", ["h"], ["total"], keepdims=0),
        helper.make_node("Greater", ["total", "zero"], ["positive"]),
        helper.make_node(
            "If",
            ["positive"],
            ["y"],
            then_branch=branch("yes", 1.0),
            else_branch=branch("no", 2.0),
        ),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 4]) for n in "xy")
    stored = [
        numpy_helper.from_array(weight, "w"),
        numpy_helper.from_array(np.zeros((), np.float32), "zero"),
    ]
    graph = helper.make_graph(nodes, "g", [x], [y], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def test_layers_inside_subgraphs_are_never_claimed_as_checked(tmp_path: Path) -> None:
    a, b = tmp_path / "a.onnx", tmp_path / "b.onnx"
    weight = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    proto = conditional(weight)
    onnx.save(proto, a)
    onnx.save(proto, b)
    report = bnfx.verify_onnx(a, b, isolate=False)
    assert report, str(report)
    assert "2 inside subgraphs" in " ".join(report.notes)
    assert "2 inside subgraphs" in str(report)
    layers = report.tiers[1]
    assert (layers.checked, layers.of) == (1, 3)
    assert [layer.node for layer in report.layers] == ["h"]
    # A wrong weight in there is for the outputs to find, which they do.
    branch = next(n for n in proto.graph.node if n.op_type == "If").attribute[0].g
    spoiled = numpy_helper.to_array(branch.initializer[0]).copy()
    spoiled[1] *= 1.01
    branch.initializer[0].CopyFrom(numpy_helper.from_array(spoiled, branch.initializer[0].name))
    onnx.save(proto, b)
    assert not bnfx.verify_onnx(a, b, isolate=False)


class Skip(nn.Module):
    """A convolution and what goes past it: one convolution, where branches are merged."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.a_bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.a_bn(self.a(x)) + x)


@pytest.mark.parametrize("merge", [True, False])
def test_a_lone_layer_of_another_form_is_no_fault(tmp_path: Path, *, merge: bool) -> None:
    model, x = randomise(Skip()), torch.randn(1, 4, 7, 7)
    unfolded, folded = tmp_path / "unfolded.onnx", tmp_path / "folded.onnx"
    bnfx.export_onnx(bnfx.fold_bn(model, x, merge_branches=merge), x, folded)
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False, optimize=False)
    assert program is not None
    program.save(unfolded)
    for reference in (model, unfolded):
        report = bnfx.verify_onnx(reference, folded, x, isolate=False)
        assert report, str(report)


@pytest.mark.parametrize("foreign", ["Gelu(h)", "QuickGelu<alpha = 1.5>(h)", "BiasGelu(h, b)"])
def test_operators_of_onnxruntime_alone_have_a_truth(tmp_path: Path, foreign: str) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]> '
        "g (float[N, 6] x) => (float[N, 4] y) <float[4] b = {1, 2, 3, 4}> "
        f"{{ h = MatMul(x, w) k = com.microsoft.{foreign} y = Softplus(k) }}"
    )
    weight = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    f, wrong = tmp_path / "a.onnx", tmp_path / "wrong.onnx"
    for path, values in ((f, weight), (wrong, weight * np.float32(1.001))):
        del model.graph.initializer[1:]
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, "w"))
        onnx.save(model, path)
    report = bnfx.verify_onnx(f, f, isolate=False)
    assert report, str(report)
    assert max(check.budget for check in report.outputs) < 1e-6
    assert bnfx.verify_onnx(f, wrong, isolate=False).status == "failed"
