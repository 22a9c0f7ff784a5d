"""export_onnx and verify_onnx with the real onnxruntime; every check is seen to fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import bnfx
from bnfx.runtime.availability import cuda_unavailable_reason
from bnfx.verification.outputs import check_output
from tests.support.laws import randomise

DYNAMIC = ({0: "batch"},)


class Two(nn.Module):
    """Two outputs of one shape; the last BatchNorm cannot be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.other, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.relu(self.bn(self.conv(x)))
        return torch.relu(self.last(torch.relu(self.other(y)))), y


def export(folder: Path, seed: int = 0) -> tuple[nn.Module, Path, Tensor]:
    torch.manual_seed(seed)
    model, x = randomise(Two(), seed), torch.randn(1, 3, 8, 8)
    f = folder / "two.onnx"
    bnfx.export_onnx(bnfx.fold_bn(model), (x,), f, dynamic_shapes=DYNAMIC)
    return model, f, x


@pytest.mark.parametrize("seed", range(5))
def test_right_files_pass(tmp_path: Path, seed: int) -> None:
    model, f, x = export(tmp_path, seed)
    report = bnfx.verify_onnx(model, f, (x,))
    assert report, str(report)
    assert report.providers.keys() == {"CPUExecutionProvider"}
    assert report.batch_sizes == (1, 2, 7)
    assert report.batch_norms_left == 1
    assert {w.name for w in report.weights} >= {"conv.weight", "conv.bias", "other.weight"}
    report.raise_for_failure()


def change(f: Path, name: str, edit: Callable[[np.ndarray], None]) -> None:
    proto = onnx.load(str(f))
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    array = onnx.numpy_helper.to_array(tensor).copy()
    edit(array)
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))
    onnx.save(proto, str(f))


def scale_channel(array: np.ndarray) -> None:
    array[3] *= 1 + 1e-3


def zero(array: np.ndarray) -> None:
    array[:] = 0


def nan(array: np.ndarray) -> None:
    array.flat[0] = np.nan


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("conv.weight", scale_channel),
        ("other.weight", scale_channel),
        ("conv.bias", zero),
        ("last.running_var", scale_channel),
        ("other.bias", nan),
    ],
)
def test_tampered_weights_fail(
    tmp_path: Path,
    name: str,
    edit: Callable[[np.ndarray], None],
) -> None:
    model, f, x = export(tmp_path)
    change(f, name, edit)
    report = bnfx.verify_onnx(model, f, (x,))
    assert report.status == "failed"
    assert report.first_divergence is not None
    assert name in report.first_divergence
    with pytest.raises(bnfx.VerificationError, match="failed"):
        report.raise_for_failure()


def first_bound(array: np.ndarray) -> None:
    array[0, int(np.argmax(np.isfinite(array[0, :, 0, 0])))] += 1e-3


def first_infinity(array: np.ndarray) -> None:
    array[0, int(np.argmax(np.isinf(array[0, :, 0, 0])))] = 1e6


@pytest.mark.parametrize("with_example", [False, True])
def test_thresholds_pass_and_wrong_ones_fail(tmp_path: Path, *, with_example: bool) -> None:
    """A BatchNorm between two ReLUs becomes bounds, most of which are infinite on one side."""
    model, x, f = randomise(Two()), torch.randn(1, 3, 8, 8), tmp_path / "two.onnx"
    folded = bnfx.fold_bn(model, x if with_example else None, thresholds=True)
    bnfx.export_onnx(folded, x, f, dynamic_shapes=DYNAMIC)
    report = bnfx.verify_onnx(model, f, x)
    assert report, str(report)
    assert report.batch_norms_left == 0
    assert {w.name for w in report.weights} >= {"relu_1_lower", "relu_1_upper"}
    for edit in (first_bound, first_infinity):
        bnfx.export_onnx(folded, x, f, dynamic_shapes=DYNAMIC)
        change(f, "relu_1_lower", edit)
        report = bnfx.verify_onnx(model, f, x, isolate=False)
        assert "relu_1_lower" in (report.first_divergence or "")


def test_wrong_eps_fails(tmp_path: Path) -> None:
    model, f, x = export(tmp_path)
    proto = onnx.load(str(f))
    (norm,) = [n for n in proto.graph.node if n.op_type == "BatchNormalization"]
    next(a for a in norm.attribute if a.name == "epsilon").f = 1e-2
    onnx.save(proto, str(f))
    assert not bnfx.verify_onnx(model, f, (x,))


def test_other_outputs_fail(tmp_path: Path) -> None:
    model, f, x = export(tmp_path)
    proto = onnx.load(str(f))
    first, second = list(proto.graph.output)
    del proto.graph.output[:]
    proto.graph.output.extend([second, first])
    onnx.save(proto, str(f))
    assert not bnfx.verify_onnx(model, f, (x,))
    del proto.graph.output[1]
    onnx.save(proto, str(f))
    report = bnfx.verify_onnx(model, f, (x,))
    assert "1 outputs" in report.outputs[0].reason


def test_changed_dtype_fails(tmp_path: Path) -> None:
    model, f, x = export(tmp_path)
    proto = onnx.load(str(f))
    out = proto.graph.output[0]
    proto.graph.node.append(
        onnx.helper.make_node("Cast", [out.name], ["wide"], to=onnx.TensorProto.DOUBLE)
    )
    out.name, out.type.tensor_type.elem_type = "wide", onnx.TensorProto.DOUBLE
    onnx.save(proto, str(f))
    assert "dtype" in bnfx.verify_onnx(model, f, (x,)).outputs[0].reason


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_unreadable_files_raise(tmp_path: Path, content: bytes | None) -> None:
    model, f, x = export(tmp_path)
    f.write_bytes(f.read_bytes()[:-500] if content is None else content)
    with pytest.raises(bnfx.VerificationError, match=r"two\.onnx"):
        bnfx.verify_onnx(model, f, (x,))


def test_missing_file_raises(tmp_path: Path) -> None:
    with pytest.raises(bnfx.VerificationError, match="no file"):
        bnfx.verify_onnx(nn.Identity().eval(), tmp_path / "none.onnx", (torch.ones(1),))


def test_a_new_nan_has_no_ratio() -> None:
    good, bad = np.ones(3), np.array([1.0, np.nan, 1.0])
    assert check_output("y", [good], [good], [good], unit=1e-7, max_ratio=4).passed
    assert "NaN" in check_output("y", [bad], [good], [good], unit=1e-7, max_ratio=4).reason
    assert check_output("y", [bad], [bad], [bad], unit=1e-7, max_ratio=4).passed
    zeros = np.zeros(3)
    assert not check_output("y", [good], [zeros], [zeros], unit=1e-7, max_ratio=4).passed


def test_export_refuses_train_mode_and_keeps_the_old_file(tmp_path: Path) -> None:
    model, f, x = export(tmp_path)
    before = f.read_bytes()
    model.get_submodule("last").train()
    with pytest.raises(bnfx.ExportError, match="'last'"):
        bnfx.export_onnx(model, (x,), f)
    with pytest.raises(bnfx.ExportError, match="opset_version=17"):
        bnfx.export_onnx(model.eval(), (x,), f, opset_version=17)
    with pytest.raises(bnfx.ExportError, match=r"torch\.onnx\.export failed"):
        bnfx.export_onnx(model, (torch.randn(1, 5, 8, 8),), f)
    assert f.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["two.onnx"]


def test_verify_refuses_a_reference_in_train_mode(tmp_path: Path) -> None:
    model, f, x = export(tmp_path)
    with pytest.raises(bnfx.VerificationError, match="train mode"):
        bnfx.verify_onnx(model.train(), f, (x,))


def test_cuda_that_is_missing_raises(tmp_path: Path) -> None:
    if cuda_unavailable_reason() is None:
        pytest.skip("CUDA works here")
    model, f, x = export(tmp_path)
    with pytest.raises(bnfx.ProviderError, match="provider='cpu'"):
        bnfx.verify_onnx(model, f, (x,), provider="cuda")
    with pytest.raises(bnfx.ProviderError, match="unknown"):
        bnfx.verify_onnx(model, f, (x,), provider="tpu")


@pytest.mark.gpu
def test_on_cuda(tmp_path: Path) -> None:
    model, f, x = export(tmp_path)
    report = bnfx.verify_onnx(model, f, (x,), provider="cuda")
    assert report, str(report)
    assert report.providers.keys() == {"CUDAExecutionProvider"}


def test_benchmark_measures_side_by_side(tmp_path: Path) -> None:
    _, f, x = export(tmp_path)
    report = bnfx.benchmark_onnx(f, x, baseline=f, num_runs=50, warmup=2)
    names = ["file", "baseline", "file, fusions off", "baseline, fusions off", "floor"]
    assert [arm.arm for arm in report.arms] == names
    assert report.ratio is not None
    assert len(bnfx.benchmark_onnx(f, x, num_runs=50, warmup=2).arms) == 1
    with pytest.raises(bnfx.BnfxError, match="num_runs"):
        bnfx.benchmark_onnx(f, x, num_runs=3)
