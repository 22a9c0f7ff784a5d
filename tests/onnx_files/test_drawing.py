"""Integers of a file's inputs are drawn as the graph reads them."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch

import bnfx
from bnfx.onnx_files.drawing import drawn, ranges


def model(inputs: str, nodes: str, stored: str = "") -> onnx.ModelProto:
    header = f'<ir_version: 8, opset_import: ["" : 17]> g ({inputs}) => (float Y)'
    found = onnx.parser.parse_model(f"{header} <{stored}> {{ {nodes} }}")
    found.graph.output[0].type.tensor_type.ClearField("shape")
    return found


TABLE = "float[5, 2] t = {0,1,2,3,4,5,6,7,8,9}"
READ: dict[str, tuple[str, str, str, tuple[int, int] | None]] = {
    "a table": ("int64[2, 3] n", "Y = Gather (t, n)", TABLE, (0, 4)),
    "the other axis": ("int64[2, 3] n", "Y = Gather <axis = 1> (t, n)", TABLE, (0, 1)),
    "a table, moved and cast": (
        "int32[2, 3] n",
        "a = Cast <to = 7> (n) b = Unsqueeze (a, o) c = Squeeze (b, o) Y = Gather (t, c)",
        f"{TABLE}, int64[1] o = {{0}}",
        (0, 4),
    ),
    "a table behind an offset": (
        "int64[2, 3] n",
        "a = Add (n, two) Y = Gather (t, a)",
        f"{TABLE}, int64[1] two = {{2}}",
        (0, 2),
    ),
    "two tables": (
        "int64[2, 3] n",
        "a = Gather (t, n) b = Gather (u, n) Y = Add (a, b)",
        f"{TABLE}, float[3, 2] u = {{0,1,2,3,4,5}}",
        (0, 2),
    ),
    "a constant table": (
        "int64[2] n",
        "t = Constant <value_floats = [1.0, 2.0]> () Y = Gather (t, n)",
        "",
        None,
    ),
    "a table inside of a branch": (
        "bool c, int64[2] n",
        "Y = If (c) <then_branch = a () => (float[2, 2] p) { p = Gather (t, n) }, "
        "else_branch = b () => (float[2, 2] q) { q = Gather (t, n) }>",
        TABLE,
        (0, 4),
    ),
    "a size": ("int64[1] n", "Y = ConstantOfShape (n)", "", (2, 2)),
    "lengths": (
        "float[7, 2, 1] X, int32[2] n",
        "Y = RNN <hidden_size = 1> (X, w, r, , n)",
        "float[1, 1, 1] w = {1}, float[1, 1, 1] r = {1}",
        (1, 7),
    ),
    "what is compared": (
        "int64 n",
        "a = Equal (n, rate) Y = Cast <to = 1> (a)",
        "int64 rate = {16000}",
        (16000, 16000),
    ),
    "a flag": ("int64[2] n", "Y = Cast <to = 1> (n)", "", None),
}


@pytest.mark.parametrize("name", READ)
def test_what_the_graph_says_of_an_integer(name: str) -> None:
    inputs, nodes, stored, wanted = READ[name]
    assert ranges(model(inputs, nodes, stored)).get("n") == wanted


def test_both_ends_are_drawn() -> None:
    source = torch.Generator().manual_seed(0)
    tokens = drawn(torch.int64, (2, 3), (0, 999), source)
    assert (int(tokens.min()), int(tokens.max())) == (0, 999)
    assert drawn(torch.uint8, (4, 4), None, source).max() == 255
    assert set(drawn(torch.int64, (9,), None, source).tolist()) == {0, 1}
    assert drawn(torch.bool, (9,), None, source).dtype is torch.bool


def test_all_of_a_table_is_compared(tmp_path: Path) -> None:
    """A file whose last row is another one does not pass."""
    files = []
    for last in ("9", "8"):
        made = model("int64[N, 3] n", "Y = Gather (t, n)", TABLE.replace("9}", f"{last}}}"))
        files.append(tmp_path / f"{last}.onnx")
        onnx.save(made, str(files[-1]))
    right, wrong = files
    assert bnfx.verify_onnx(right, right, isolate=False)
    assert bnfx.verify_onnx(right, wrong, isolate=False, localize=False).status == "failed"
