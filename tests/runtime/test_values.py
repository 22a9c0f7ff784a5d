"""What goes into a session and comes out; bfloat16, which numpy lacks, as float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import parser

import bnfx
from bnfx.runtime import runner
from bnfx.runtime.isolated import execute_apart
from bnfx.runtime.runner import Request
from bnfx.runtime.values import ort_value


def casting(folder: Path) -> Path:
    """The CPU has no layer in bfloat16; it casts."""
    text = "g (bfloat16[N] x) => (float[N] y, bfloat16[N] z) { y = Cast<to=1>(x) z = Identity(x) }"
    model = parser.parse_model(f'<ir_version: 9, opset_import: ["": 18]> {text}')
    onnx.save(model, folder / "cast.onnx")
    return folder / "cast.onnx"


def test_bfloat16_goes_in_and_comes_out(tmp_path: Path) -> None:
    x = np.array([1, 1 + 2**-8, 1 + 3 * 2**-8, -0.1, 3.4e38, np.inf, np.nan, 1e-40], np.float32)
    wanted = torch.from_numpy(x).bfloat16().float().numpy()
    request = Request(str(casting(tmp_path)), "cpu", str(tmp_path), ("x",), 2)
    runs = [[x], [x[:0]]]
    for answer in (runner.execute(request, runs), execute_apart(request, runs, timeout=60)):
        assert not answer.failures
        for out in answer.results[0] or []:
            np.testing.assert_array_equal(out, wanted)
        assert [out.shape for out in answer.results[1] or []] == [(0,), (0,)]


def test_bfloat16_is_measured(tmp_path: Path) -> None:
    x = torch.ones(4, dtype=torch.bfloat16)
    found = bnfx.benchmark_onnx(casting(tmp_path), x, num_runs=50, warmup=1)
    assert found.arithmetic == "bfloat16"
    assert found.device


@pytest.mark.parametrize("kind", ["tensor(float)", "tensor(bfloat16)"])
def test_values_keep_their_shape(kind: str) -> None:
    given = np.ones((2, 3, 4), np.float32).transpose(2, 0, 1)
    assert ort_value(given, kind).shape() == [4, 2, 3]
