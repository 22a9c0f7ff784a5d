"""deploy, inspect_onnx and removal_ledger with the real exporter and the real onnxruntime."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import bnfx
from tests.laws import randomise
from tests.test_verify import DYNAMIC, Two, export


def test_deploy_writes_a_verified_file_and_a_report(tmp_path: Path) -> None:
    model, x = randomise(Two()), torch.randn(1, 3, 8, 8)
    f, written = tmp_path / "net.onnx", tmp_path / "report.json"
    done = bnfx.deploy(model, (x,), f, report=written, dynamic_shapes=DYNAMIC)
    assert done
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx", "report.json"]
    assert json.loads(written.read_text())["status"] == "deployed"
    assert bnfx.verify_onnx(model, f, (x,))


def test_a_failed_deploy_keeps_the_old_file_and_leaves_a_bundle(tmp_path: Path) -> None:
    model, x = randomise(Two()), torch.randn(1, 3, 8, 8)
    f = tmp_path / "net.onnx"
    f.write_bytes(b"older")
    with pytest.raises(bnfx.VerificationError, match="not written") as caught:
        bnfx.deploy(model, (x,), f, max_ratio=1e-3, bundle=tmp_path / "bundle")
    assert caught.value.report.status == "failed"
    assert f.read_bytes() == b"older"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "net.onnx"]
    names = {"net.onnx", "inputs.npz", "report.json", "report.txt", "environment.json"}
    assert {p.name for p in (tmp_path / "bundle").iterdir()} == names


def test_inspect_lists_every_batch_norm(tmp_path: Path) -> None:
    _, f, _ = export(tmp_path)
    found = bnfx.inspect_onnx(f)
    (norm,) = found.batch_norms
    assert (norm.module, norm.channels, norm.training_mode) == ("last", 8, False)
    assert found.by_bnfx == bnfx.__version__
    assert found.inputs == {"x": "float32[batch,3,8,8]"}


def test_ledger_says_who_removed_what(tmp_path: Path) -> None:
    model, f, x = export(tmp_path)
    found = bnfx.removal_ledger(model, (x,), f)
    removed = {bn.path: bn.removed_by for bn in found.batch_norms}
    assert removed == {"bn": "bnfx", "last": "onnxruntime full"}
    assert found.left["onnxruntime extended"] == 1
    assert bnfx.removal_ledger(None, f=f).left["source"] == 1
