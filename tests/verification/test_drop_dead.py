"""Files of networks that lost channels: right ones pass, with any block, and wrong ones fail."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import bnfx
from bnfx.onnx_files.reading import OPTIONS
from tests.support.sparse import sparse_network


@pytest.mark.parametrize(("block", "claims"), [(4, True), (1, False)])
def test_dropped_channels(tmp_path: Path, block: int, *, claims: bool) -> None:
    model, x = sparse_network(3)
    model, x, file = model.float(), x.float(), tmp_path / "net.onnx"
    done = bnfx.deploy(model, x, file, fold_options={"drop_dead": True, "block": block})
    assert done.fold.dropped
    if not claims:
        proto = onnx.load(file)
        del proto.metadata_props[:]
        onnx.save(proto, file)
    assert bnfx.verify_onnx(model, file, x)
    proto = onnx.load(file)
    for tensor in proto.graph.initializer:
        values = numpy_helper.to_array(tensor).copy()
        if values.ndim == 4 and values.shape[0] > 1:
            values.reshape(-1)[np.argmax(abs(values))] *= 1.5
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(proto, file)
    assert not bnfx.verify_onnx(model, file, x)


@pytest.mark.parametrize("told", ["no json", "[]", '{"drop_dead": true, "block": -1}', "{}"])
def test_what_a_file_says_of_its_folding_changes_nothing(tmp_path: Path, told: str) -> None:
    model, x = sparse_network(3)
    model, x, file = model.float(), x.float(), tmp_path / "net.onnx"
    bnfx.export_onnx(bnfx.fold_bn(model, x), x, file)
    proto = onnx.load(file)
    for entry in proto.metadata_props:
        entry.value = told if entry.key == OPTIONS else entry.value
    onnx.save(proto, file)
    assert bnfx.verify_onnx(model, file, x)
