"""What deploy and verify_onnx make of models and arguments that are not the usual ones."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import bnfx
from bnfx.verification.outputs import check_output
from tests.support.laws import randomise

X = torch.linspace(-2, 2, 384).reshape(2, 3, 8, 8)
FREE = {0: "batch"}


class Core(nn.Module):
    """A convolution and its BatchNorm, which subclasses put to use."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def core(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


class Noisy(Core):
    def forward(self, x: Tensor) -> Tensor:
        y = self.core(x)
        return y + torch.randn_like(y)


class Dropping(Core):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.core(x), 0.5, training=True)


class Sampling(Core):
    def forward(self, x: Tensor) -> Tensor:
        return torch.bernoulli(torch.sigmoid(self.core(x)))


@pytest.mark.parametrize("kind", [Noisy, Dropping, Sampling])
def test_a_reference_of_random_numbers_is_refused(tmp_path: Path, kind: type[nn.Module]) -> None:
    """Its own error would be the budget: as large as its output, so that anything would pass."""
    with pytest.raises(bnfx.VerificationError, match="another one each time"):
        bnfx.deploy(randomise(kind()), X, tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


class Several(Core):
    def forward(self, *xs: Tensor) -> Tensor:
        return self.core(xs[0]) + self.core(xs[1])


class Asking(Core):
    def forward(self, x: Tensor) -> Tensor:
        return self.core(x) if x.shape[0] > 1 else self.core(-x)


class Scaled(Core):
    def forward(self, x: Tensor, mask: Tensor | None = None, factor: float = 1.0) -> Tensor:
        y = self.core(x) * factor
        return y if mask is None else y * mask


class Sized(Core):
    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return self.core(x), x.shape[0]


class WideHead(Core):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.core(x).mean((2, 3)).double())
        return y


@pytest.mark.parametrize(
    ("kind", "args", "kwargs", "shapes"),
    [
        (Several, (X, X + 1), {}, None),
        (Asking, (X,), {}, None),
        (Scaled, (X, None, 2.0), {}, (FREE, None, None)),
        (Scaled, (X,), {"factor": 2.0}, {"x": FREE, "factor": None}),
        (Sized, (X,), {}, (FREE,)),
        (WideHead, (X,), {}, None),
    ],
)
def test_right_files_pass(
    tmp_path: Path, kind: type[nn.Module], args: tuple[Any, ...], kwargs: Any, shapes: Any
) -> None:
    model, f = randomise(kind()), tmp_path / "net.onnx"
    done = bnfx.deploy(model, args, f, kwargs=kwargs, dynamic_shapes=shapes)
    assert done.verify.tiers[0].status == "passed", str(done)
    proto = onnx.load(str(f))
    weight = next(t for t in proto.graph.initializer if len(t.dims) == 4)
    changed = onnx.numpy_helper.to_array(weight).copy()
    changed[2] *= 1 + 1e-4
    weight.CopyFrom(onnx.numpy_helper.from_array(changed, weight.name))
    onnx.save(proto, str(f))
    report = bnfx.verify_onnx(model, f, args, kwargs=kwargs)
    assert "channel 2" in (report.first_divergence or "")


def test_what_is_folded_by_the_exporter_behind_a_hook_passes(tmp_path: Path) -> None:
    model = randomise(nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))))
    model.get_submodule("0").register_forward_hook(lambda *_: None)
    done = bnfx.deploy(model, X, tmp_path / "net.onnx")
    assert done.fold.batch_norms[0].verdict == "kept"
    assert (done.verify.tiers[0].status, len(done.verify.weights)) == ("passed", 2)


class Between(Core):
    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.dropout(self.conv(x).clone(), 0.5, self.training)
        return torch.relu(self.bn(y.reshape(y.shape)))


def test_what_is_folded_by_the_exporter_past_operators_that_do_nothing_passes(
    tmp_path: Path,
) -> None:
    model = randomise(Between())
    model.get_submodule("conv").register_forward_hook(lambda *_: None)
    done = bnfx.deploy(model, X, tmp_path / "net.onnx")
    assert done.fold.batch_norms[0].verdict == "kept"
    assert (done.verify.tiers[0].status, len(done.verify.weights)) == ("passed", 2)


def test_zero_in_theory_is_held_to_the_noise_in_practice() -> None:
    zero, noise = np.zeros(4), np.array([1.0, -1.0, 1.0, -1.0]) * 1e-8
    assert check_output("y", [2 * noise], [noise], [zero], unit=1e-7, max_ratio=4).passed
    assert not check_output("y", [noise + 1], [noise], [zero], unit=1e-7, max_ratio=4).passed


@pytest.mark.parametrize(
    "options",
    [
        {"max_ratio": math.inf},
        {"max_ratio": math.nan},
        {"max_ratio": "4"},
        {"batch_sizes": [0]},
        {"batch_sizes": [-1]},
        {"batch_sizes": [2.5]},
        {"batch_sizes": 3},
        {"num_inputs": 2.5},
        {"inputs": [None]},
        {"args": 3},
        {"args": X[:0]},
        {"precision": ["fp32"]},
        {"provider": None},
        {"model": None},
    ],
)
def test_arguments_that_make_no_sense_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    model, f = randomise(Asking()), tmp_path / "net.onnx"
    bnfx.export_onnx(bnfx.fold_bn(model, X), X, f)
    given = {"model": model, "args": X, **options}
    with pytest.raises(bnfx.BnfxError):
        bnfx.verify_onnx(given.pop("model"), f, given.pop("args"), **given)


def _pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


@pytest.mark.parametrize(
    "place", [_pipe, lambda folder: folder / ("n" * 300), lambda folder: folder / "a\0b"]
)
def test_what_is_no_file_is_not_replaced(tmp_path: Path, place: Callable[[Path], Path]) -> None:
    f = place(tmp_path)
    before = list(tmp_path.iterdir())
    with pytest.raises(bnfx.ExportError, match=r"pipe|cannot be the name"):
        bnfx.export_onnx(randomise(Asking()), X, f)
    assert list(tmp_path.iterdir()) == before
    assert not before or before[0].is_fifo()


@pytest.mark.parametrize(
    "options", [{"input_names": "x"}, {"input_names": ["a", "b"]}, {"output_names": ["a", "b"]}]
)
def test_names_that_do_not_fit_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(bnfx.ExportError, match="_names="):
        bnfx.export_onnx(randomise(Asking()), X, tmp_path / "net.onnx", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_that_cannot_be_written_does_not_hide_the_failure(tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"")
    with pytest.raises(bnfx.VerificationError, match="not written") as caught:
        bnfx.deploy(
            randomise(Asking()), X, tmp_path / "n.onnx", max_ratio=0, bundle=tmp_path / "taken"
        )
    assert "cannot be written" in caught.value.report.bundle
