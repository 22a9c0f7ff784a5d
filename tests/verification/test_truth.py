"""Verified against a truth, or not at all: what float64 gives is the reference's own function."""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.backend.test.case.node import _NodeTestCases
from onnx.reference import ReferenceEvaluator
from onnxruntime.capi.onnxruntime_pybind11_state import Fail
from torch import Tensor, nn

import bnfx
from bnfx.verification.file_operators import OPERATORS
from bnfx.verification.outputs import parting
from tests.support.laws import randomise
from tests.support.onnx_graphs import distance, run

#: Modules of onnx's own examples, for the operators that are evaluated here.
EXAMPLES = (
    *(
        "averagepool",
        "batch_normalization",
        "conv",
        "convtranspose",
        "dequantizelinear",
        "globalaveragepool",
    ),
    *("globalmaxpool", "gru", "hardmax", "logsoftmax", "lppool", "lrn", "lstm"),
    *("maxpool", "meanvariancenormalization", "resize", "rnn", "softmax", "upsample"),
)
#: Corners that are aligned by a size that is no whole number; torch and onnxruntime take that of
#: the result, as the operator's text has it.
OTHERS_DISAGREE = (
    "test_resize_downsample_scales_cubic_align_corners",
    "test_resize_downsample_scales_linear_align_corners",
)


def examples() -> Iterator[tuple[onnx.ModelProto, Sequence[np.ndarray], Sequence[np.ndarray]]]:
    """The examples that onnx gives of these operators: model, inputs, expected outputs."""
    for name in EXAMPLES:
        importlib.import_module(f"onnx.backend.test.case.node.{name}")
    named = {kind.name for kind in OPERATORS}  # type: ignore[attr-defined]
    for case in _NodeTestCases:
        assert case.model is not None
        assert case.data_sets
        inputs, outputs = case.data_sets[0]
        plain = all(isinstance(array, np.ndarray) for array in inputs)
        plain = plain and case.name not in OTHERS_DISAGREE
        if len(case.model.graph.node) == 1 and case.model.graph.node[0].op_type in named and plain:
            yield case.model, inputs, outputs


def test_own_evaluators_give_what_onnx_expects() -> None:
    seen = set()
    for model, inputs, outputs in examples():
        kind = model.graph.node[0].op_type
        names = [value.name for value in model.graph.input]
        feed = {
            name: array.astype(np.float64) if array.dtype == np.float32 else array
            for name, array in zip(names, inputs, strict=True)
        }
        found = ReferenceEvaluator(model, new_ops=OPERATORS).run(None, feed)
        for ours, expected in zip(found, outputs, strict=True):
            unit = 1e-3 if expected.dtype.itemsize < 4 else 1e-5
            close = np.allclose(ours.astype("f8"), expected.astype("f8"), rtol=unit, atol=6e-5)
            assert ours.shape == expected.shape, kind
            assert close, kind
        seen.add(kind)
    assert len(seen) == len(EXAMPLES), sorted(seen)


def file_of(text: str, opset: int, path: Path) -> Path:
    """A file written as text: a graph of one node on X, with what it stores."""
    header = f'<ir_version: 7, opset_import: ["" : {opset}]> g '
    onnx.save(onnx.parser.parse_model(header + text), path)
    return path


STATISTICS = (
    "float[4] s = {1,2,3,4}, float[4] b = {0,1,0,1}, float[4] m = {%s}, float[4] v = {1,2,3,4}"
)
FILES = {
    "batch norm": (
        11,
        f"(float[N,4,5,5] X) => (float[N,4,5,5] Y) <{STATISTICS % '1,0,2,0'}> "
        "{ Y = BatchNormalization <momentum: float = 0.9> (X, s, b, m, v) }",
    ),
    "softmax": (11, "(float[2,3,4] X) => (float[2,3,4] Y) { Y = Softmax (X) }"),
    "lrn": (11, "(float[2,6,5,5] X) => (float[2,6,5,5] Y) { Y = LRN <size = 3, alpha = 0.7> (X) }"),
    "upsample": (
        7,
        "(float[2,3,6,6] X) => (float[2,3,12,15] Y) "
        "{ Y = Upsample <scales = [1.0, 1.0, 2.0, 2.5]> (X) }",
    ),
    "linear upsample": (
        9,
        "(float[2,3,6,6] X) => (float[2,3,12,9] Y) <float[4] f = {1.0, 1.0, 2.0, 1.5}> "
        '{ Y = Upsample <mode = "linear"> (X, f) }',
    ),
    "resize of opset 10": (
        10,
        "(float[2,3,6,6] X) => (float[2,3,3,9] Y) <float[4] f = {1.0, 1.0, 0.5, 1.5}> "
        "{ Y = Resize (X, f) }",
    ),
    "lp normalization": (
        7,
        "(float[2,3,8] X) => (float[2,3,8] Y) { Y = LpNormalization <axis = 1, p = 1> (X) }",
    ),
    "roi align, whose regions are whole pixels": (
        10,
        "(float[2,3,9,9] X) => (float[2,3,2,3] Y) "
        "<float[2,4] r = {1,2,7,8,0,0,0.5,0.5}, int64[2] n = {1,0}> "
        "{ Y = RoiAlign <output_height = 2, output_width = 3> (X, r, n) }",
    ),
    "scatter": (
        9,
        "(float[3,4] X) => (float[3,4] Y) <int64[1,2] n = {2,-3}, float[1,2] u = {5,6}> "
        "{ Y = Scatter <axis = 0> (X, n, u) }",
    ),
    "lp pool": (11, "(float[2,3,8] X) => (float[2,3,1] Y) { Y = GlobalLpPool <p = 3> (X) }"),
}


WAYS = (
    *("align_corners", "asymmetric", "half_pixel", "half_pixel_symmetric"),
    *("pytorch_half_pixel", "tf_crop_and_resize"),
)


def resizing(rng: random.Random) -> tuple[onnx.ModelProto, list[int]]:
    """A Resize with some of all that it can be told, and the shape of its input."""
    mode, way = rng.choice(("nearest", "linear", "cubic")), rng.choice(WAYS)
    told: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": way}
    if mode == "nearest":
        told["nearest_mode"] = rng.choice(("round_prefer_floor", "round_prefer_ceil", "floor"))
    else:
        told |= {"antialias": rng.choice((0, 1)), "exclude_outside": rng.choice((0, 1))}
    size = [rng.randint(2, 9), rng.randint(2, 9)]
    stored = {"roi": np.array((0, 0.25, 1, 0.9) if way == "tf_crop_and_resize" else (), "f4")}
    if rng.random() < 0.5:
        stored["scales"] = np.array([rng.choice((0.5, 0.6, 1.5, 2, 3.3)) for _ in size], "f4")
    else:
        stored["sizes"] = np.array([n + rng.randint(1, 9) for n in size])
        told["keep_aspect_ratio_policy"] = rng.choice(("stretch", "not_larger", "not_smaller"))
    names = ["X", *(name if name in stored else "" for name in ("roi", "scales", "sizes"))]
    node = onnx.helper.make_node("Resize", names, ["Y"], axes=[2, 3], **told)
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [value("X", 1, [2, 3, *size])],
        [value("Y", 1, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    sets = [onnx.helper.make_opsetid("", 19)]
    return onnx.helper.make_model(graph, opset_imports=sets, ir_version=8), [2, 3, *size]


def test_resizing_is_what_onnxruntime_does() -> None:
    rng, draw, tried = random.Random(0), np.random.default_rng(0), 0
    for _ in range(150):
        model, shape = resizing(rng)
        x = draw.standard_normal(shape).astype(np.float32)
        try:
            y = run(model, {"X": x})["Y"]
        except (RuntimeError, Fail):  # what onnxruntime does not have
            continue
        (ours,) = ReferenceEvaluator(model, new_ops=OPERATORS).run(None, {"X": x.astype("f8")})
        if y.shape == x.shape:  # it copies, whatever the scale
            continue
        tried += 1
        assert distance(np.asarray(ours), y) < 1e-5, model.graph.node[0]
    assert tried > 100


@pytest.mark.parametrize("name", FILES)
def test_a_file_against_itself_has_a_budget_of_float32(tmp_path: Path, name: str) -> None:
    opset, text = FILES[name]
    f = file_of(text, opset, tmp_path / "a.onnx")
    report = bnfx.verify_onnx(f, f, isolate=False)
    assert report, str(report)
    assert max(check.budget for check in report.outputs) < 1e-6


def test_another_function_of_the_same_name_fails(tmp_path: Path) -> None:
    old, new = (
        file_of(FILES["softmax"][1], opset, tmp_path / f"{opset}.onnx") for opset in (11, 13)
    )
    assert not bnfx.verify_onnx(old, new, isolate=False)
    opset, text = FILES["batch norm"]
    f = file_of(text, opset, tmp_path / "right.onnx")
    other = file_of(text.replace("m = {1,0,2,0}", "m = {1,0,2,1}"), opset, tmp_path / "wrong.onnx")
    report = bnfx.verify_onnx(f, other, isolate=False)
    assert report.status == "failed", str(report)


def recurrent(folder: Path, **attributes: Any) -> Path:
    rng = np.random.default_rng(0)
    stored = {"W": (1, 12, 4), "R": (1, 12, 3), "B": (1, 24)}
    node = onnx.helper.make_node("LSTM", ["X", *stored], ["Y"], hidden_size=3, **attributes)
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [value("X", onnx.TensorProto.FLOAT, [5, 2, 4])],
        [value("Y", onnx.TensorProto.FLOAT, [5, 1, 2, 3])],
        [
            onnx.numpy_helper.from_array(rng.standard_normal(shape).astype("f4"), name)
            for name, shape in stored.items()
        ],
    )
    f = folder / f"{len(list(folder.iterdir()))}.onnx"
    onnx.save(
        onnx.helper.make_model(
            graph, opset_imports=[onnx.helper.make_opsetid("", 14)], ir_version=8
        ),
        f,
    )
    return f


def test_recurrent_layers_are_held_to_their_attributes(tmp_path: Path) -> None:
    plain, clipped = recurrent(tmp_path), recurrent(tmp_path, clip=0.3)
    for f in (plain, clipped):
        report = bnfx.verify_onnx(f, f, isolate=False)
        assert report, str(report)
        assert report.outputs[0].budget < 1e-6
    assert bnfx.verify_onnx(plain, clipped, isolate=False).status == "failed"
    assert bnfx.verify_onnx(clipped, plain, isolate=False).status == "failed"


def test_without_a_truth_nothing_is_verified(tmp_path: Path) -> None:
    """Onnxruntime takes no dilation into account where padding is SAME, so the sources disagree."""
    text = (
        "(float[1,2,9,9] X) => (float[1,2,9,9] Y) { R = Relu (X) Y = MaxPool "
        '<kernel_shape = [3, 3], dilations = [2, 2], auto_pad = "SAME_UPPER"> (R) }'
    )
    f = file_of(text, 12, tmp_path / "a.onnx")
    report = bnfx.verify_onnx(f, f, isolate=False)
    assert report.status == "skipped", str(report)
    assert not report
    assert "they part at MaxPool" in str(report.first_divergence)
    with pytest.raises(bnfx.VerificationError, match="not verified"):
        report.raise_for_failure()


class Chaos(nn.Module):
    """The logistic map: after 60 steps float32 and float64 have nothing in common."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.map = nn.Linear(4, 4), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(self.a(x))
        for _ in range(60):
            y = 3.9 * y * (1 - y)
        out: Tensor = self.map(y)
        return out


def test_a_chaotic_network_is_not_verified(tmp_path: Path) -> None:
    model, x, f = Chaos().eval(), torch.randn(3, 4), tmp_path / "chaos.onnx"
    bnfx.export_onnx(model, x, f)
    report = bnfx.verify_onnx(model, f, x, isolate=False)
    assert report.status == "skipped", str(report)
    assert "they part at Identity 'map'" in str(report.first_divergence)
    with pytest.raises(bnfx.VerificationError, match="not verified"):
        bnfx.deploy(model, x, tmp_path / "deployed.onnx")
    assert not (tmp_path / "deployed.onnx").exists()


def test_parting_is_told_by_shape_kind_share_and_size() -> None:
    ones, ints = np.ones(1000), np.arange(1000)
    assert parting([ones], [ones * (1 + 1e-6)], 1e-3) == ""
    assert "difference of 1.0e-02" in parting([ones * 1.01], [ones], 1e-3)
    assert "its shape" in parting([ones], [ones[:, None]], 1e-3)
    assert "its dtype" in parting([ones], [ints], 1e-3)
    assert parting([ints], [np.where(ints == 5, 6, ints)], 1e-3) == ""
    assert "2 of 1000 values" in parting([ints], [np.where(ints < 2, -1, ints)], 1e-3)
    holed = np.where(ints < 2, np.nan, ones)
    assert "NaN or infinite in one alone" in parting([holed], [ones], 1e-3)
    assert parting([holed], [holed], 1e-3) == ""
    assert "difference" in parting([ones], [ones * 0], 1e-3)
    assert parting([ones * 1e-8], [ones * 0], 1e-3) == ""


def test_drawn_inputs_may_be_negative_and_nan_in_given_ones_is_told(tmp_path: Path) -> None:
    text = "(float[N,4] X) => (float[N,4] Y) { R = Sqrt (X) Y = Add (R, X) }"
    f = file_of(text, 13, tmp_path / "root.onnx")
    assert bnfx.verify_onnx(f, f, isolate=False)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    x = torch.randn(2, 3, 6, 6)
    g = tmp_path / "conv.onnx"
    bnfx.export_onnx(bnfx.fold_bn(model), x, g)
    x[0, 0, 0, 0] = torch.nan
    report = bnfx.verify_onnx(model, g, x, isolate=False)
    assert report, str(report)  # the same NaNs as the model, and numbers elsewhere
    report = bnfx.verify_onnx(model, g, torch.full_like(x, torch.nan), num_inputs=1, isolate=False)
    assert report.status == "skipped"
    assert "input 'input' holds 216 NaN" in str(report.first_divergence)
    assert any("holds 216 NaN" in note for note in report.notes)


def test_nan_in_a_weight_of_the_reference_is_no_fault_of_the_file(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        model.get_parameter("0.weight")[1] = torch.nan
    done = bnfx.deploy(model, x, tmp_path / "net.onnx").verify
    assert any("'0.weight' of the reference itself hold NaN" in note for note in done.notes)
    proto = onnx.load(tmp_path / "net.onnx")
    (weight,) = [t for t in proto.graph.initializer if t.name == "0.weight"]
    spoiled = onnx.numpy_helper.to_array(weight).copy()
    spoiled[2, 0, 0, 0] = np.nan
    weight.CopyFrom(onnx.numpy_helper.from_array(spoiled, weight.name))
    onnx.save(proto, tmp_path / "net.onnx")
    assert not bnfx.verify_onnx(model, tmp_path / "net.onnx", x, isolate=False)


class Spectrum(nn.Module):
    """Complex in, complex out, with a weight of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.randn(6, dtype=torch.complex64))
        self.conv, self.norm = nn.Conv1d(2, 4, 1), nn.BatchNorm1d(4)

    def forward(self, z: Tensor) -> Tensor:
        z = z * self.phase
        y = self.norm(self.conv(torch.cat([z.real, z.imag], 1)))
        return torch.complex(y[:, :2], y[:, 2:])


def test_complex_numbers_are_verified(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, z = randomise(Spectrum()), torch.randn(2, 1, 6, dtype=torch.complex64)
    f = tmp_path / "net.onnx"
    assert bnfx.deploy(model, z, f, dynamic_shapes=({0: "batch"},)).verify.batch_sizes == (2, 1, 7)
    with torch.no_grad():
        model.get_parameter("phase")[0] *= 1.001
    assert not bnfx.verify_onnx(model, f, z, isolate=False)


def test_integers_near_a_tie_may_be_either() -> None:
    ones = np.ones(3, np.int64)
    from bnfx.verification.outputs import check_output

    for ours, passed in ((1, True), (2, True), (3, False)):
        check = check_output(
            "y", [ones * ours], [ones * 2], [ones], unit=1e-7, max_ratio=4.0, sound=1.0
        )
        assert check.passed is passed


@pytest.mark.parametrize("bias", [0.0, -27.0])
def test_sigmoids_far_out_are_held_to_what_the_kernel_resolves(tmp_path: Path, bias: float) -> None:
    """Where float64 goes on, the Sigmoid of onnxruntime ends at 1.5e-8."""

    def model(extra: float) -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(2, 1, 3), nn.Sigmoid(), nn.Flatten())
        with torch.no_grad():
            net[0].weight.mul_(8)  # type: ignore[operator]
            net[0].bias.fill_(bias + extra)  # type: ignore[operator]
        return net.eval()

    x, f, other = torch.randn(2, 2, 12, 12), tmp_path / "a.onnx", tmp_path / "b.onnx"
    bnfx.export_onnx(model(0.0), x, f)
    bnfx.export_onnx(model(0.02), x, other)
    for reference in (model(0.0), f):
        report = bnfx.verify_onnx(reference, f, x, isolate=False)
        assert report, str(report)
        assert bool(bias) == any("Sigmoid errs" in note for note in report.notes)
    report = bnfx.verify_onnx(f, other, x, isolate=False)
    assert report.status == "failed", str(report)


def test_sigmoids_below_all_that_the_kernel_resolves_verify_nothing(tmp_path: Path) -> None:
    text = "(float[2,4] X) => (float[2,4] Y) { S = Sub (X, C) Y = Sigmoid (S) }"
    text = text.replace("{", "<float[1] C = {40.0}> {", 1)
    f = file_of(text, 13, tmp_path / "far.onnx")
    report = bnfx.verify_onnx(f, f, isolate=False)
    assert report.status == "skipped"
    assert "resolves" in str(report.first_divergence)
