"""Layers with computed weights or with hooks: right files pass, spoiled ones do not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import bnfx
from tests.support.fault_networks import chain, chain_input
from tests.support.laws import randomise

SQUARE = {"kernel_size": 3, "padding": 1}


@pytest.mark.parametrize("norms", [True, False], ids=["norms", "plain"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.Conv1d, SQUARE),
        (nn.ConvTranspose2d, {**SQUARE, "groups": 2}),
        (nn.Linear, {}),
    ],
    ids=["conv1d", "conv_transpose2d", "linear"],
)
def test_a_right_file_passes(tmp_path: Path, kind: Any, options: Any, *, norms: bool) -> None:
    """Whatever is done to a layer, every weight is compared."""
    torch.manual_seed(0)
    model, example = randomise(chain(kind, norms=norms, **options)), chain_input(kind)
    done = bnfx.deploy(model, example, tmp_path / "m.onnx", num_inputs=2).verify
    assert len(done.weights) == done.tiers[0].of >= 22, str(done)


def _scaled(array: np.ndarray) -> np.ndarray:
    array[:, 1] *= 1 + 1e-3
    return array


def _shifted(array: np.ndarray) -> np.ndarray:
    array.reshape(-1)[5] += 1e-3 * np.abs(array).max()
    return array


SPOILED: dict[str, tuple[int, Callable[[np.ndarray], np.ndarray]]] = {
    "a channel scaled": (1, _scaled),
    "channels swapped": (1, lambda a: a[[1, 0, 2, 3]]),
    "one weight": (1, _shifted),
    "bias": (2, lambda a: a * (1 + 1e-3)),
    "kernel transposed": (1, lambda a: a.swapaxes(-1, -2)),
}


@pytest.mark.parametrize("norms", [True, False], ids=["norms", "plain"])
@pytest.mark.parametrize("folded", [True, False], ids=["folded", "unfolded"])
def test_a_spoiled_file_does_not(tmp_path: Path, *, folded: bool, norms: bool) -> None:
    """Each fault in another layer, in what bnfx writes and in what torch makes of the model."""
    torch.manual_seed(1)
    ways = ["a hook that looks", "weight_norm", "spectral_norm", "low rank"]
    ways += ["pruned"] if folded else ["a hook before"]  # torch exports no model that is pruned
    model, example = randomise(chain(nn.Conv2d, *ways, norms=norms, **SQUARE)), chain_input(None)
    f = tmp_path / "m.onnx"
    bnfx.export_onnx(bnfx.fold_bn(model, example) if folded else model, example, f)
    right = bnfx.verify_onnx(model, f, example, num_inputs=2, isolate=False)
    assert right, right.first_divergence
    assert len(right.weights) == right.tiers[0].of == 10, str(right)
    clean = onnx.load(f)
    for which, (fault, (operand, edit)) in enumerate(SPOILED.items()):
        proto = copy.deepcopy(clean)
        node = [node for node in proto.graph.node if node.op_type == "Conv"][which]
        (tensor,) = [t for t in proto.graph.initializer if t.name == node.input[operand]]
        spoiled = np.ascontiguousarray(edit(numpy_helper.to_array(tensor).copy()))
        tensor.CopyFrom(numpy_helper.from_array(spoiled, tensor.name))
        onnx.save(proto, f)
        found = bnfx.verify_onnx(model, f, example, num_inputs=2, isolate=False)
        assert found.divergence is not None, f"{ways[which]}: {fault}"
        assert found.divergence.tier == "weights" or not folded, f"{ways[which]}: {fault}"


def test_wrong_statistics_do_not_pass(tmp_path: Path) -> None:
    torch.manual_seed(2)
    ways = ("a hook that looks", "weight_norm", "pruned")
    model, example = randomise(chain(nn.Conv2d, *ways, norms=True, **SQUARE)), chain_input(None)
    variance = model.get_buffer("layer0_bn.running_var")
    right = variance.clone()
    variance[2] *= 1 + 1e-3
    bnfx.export_onnx(bnfx.fold_bn(model, example), example, tmp_path / "m.onnx")
    variance.copy_(right)
    found = bnfx.verify_onnx(model, tmp_path / "m.onnx", example, num_inputs=2, isolate=False)
    assert "channel 2" in (found.first_divergence or "")
