"""Inputs from the command line: what is read, and that everything else is told in a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bnfx.cli.inputs import bind, dynamic_shapes, parse_inputs
from bnfx.cli.specs import DTYPES
from bnfx.errors import UsageError
from tests.support.networks import net

_SOME = settings(max_examples=80, deadline=None)
NUMBERS = st.one_of(
    st.integers(-300, 300).map(str),
    st.sampled_from(["1e400", "inf", "-inf", "nan", "9223372036854775807", "-1e30", "0.5", ""]),
)


@_SOME
@given(
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from(sorted(DTYPES)),
    st.tuples(NUMBERS, NUMBERS),
)
def test_a_range_is_kept_or_refused(shape: list[int], dtype: str, ends: tuple[str, str]) -> None:
    spec = f"x:{'x'.join(map(str, shape))}:{dtype}:{ends[0]}..{ends[1]}"
    try:
        value = parse_inputs([spec])["x"]
    except UsageError as error:
        assert spec in str(error)  # noqa: PT017  # to draw or to refuse, both will do
        return
    low, high = map(float, ends)
    assert value.dtype is getattr(torch, dtype)
    assert list(value.shape) == shape
    if dtype != "bool" and value.numel():
        wide = value.double()
        slack = 0.01 * max(abs(low), abs(high))  # of bfloat16
        assert bool(wide.isfinite().all())
        assert low - slack <= float(wide.min()) <= float(wide.max()) <= high + slack


@_SOME
@given(st.text(alphabet="x:.,1290axfloat16-_ \n", max_size=20))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        found = parse_inputs([text])
    except UsageError:
        return
    assert all(isinstance(value, Tensor) for value in found.values())


@pytest.mark.parametrize(("spec", "says"), [
    ("x", "has not the form"),
    ("x:1x3:float8", "dtype 'float8' is unknown"),
    ("x:1x-3", "is no shape"),
    ("x:batchx3", "is no shape"),
    (f"x:{'9' * 5000}", "is no shape"),
    ("x:100000x100000", "GiB"),
    ("x:2:float32:1", "is no range"),
    ("x:2:uint8:-5..-1", "is no range"),
    ("x:2:float16:0..1e6", "is no range"),
    ("none.npz", "there is no file"),
])  # fmt: skip
def test_what_is_wrong_is_said(spec: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_inputs([spec])


def test_numbers_are_the_same_each_time_and_differ_by_input() -> None:
    first, again = (parse_inputs(["a:2x3", "b:2x3"]) for _ in range(2))
    assert torch.equal(first["a"], again["a"])
    assert not torch.equal(first["a"], first["b"])


def test_arrays_of_a_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", a=np.ones((2, 3), np.float32), b=np.array([1, 2]))
    found = parse_inputs([str(tmp_path / "in.npz"), "c:1:bool"])
    assert {name: (value.dtype, tuple(value.shape)) for name, value in found.items()} == {
        "a": (torch.float32, (2, 3)),
        "b": (torch.int64, (2,)),
        "c": (torch.bool, (1,)),
    }
    with pytest.raises(UsageError, match="given twice"):
        parse_inputs([str(tmp_path / "in.npz"), "a:1"])


@pytest.mark.parametrize("content", [b"", b"PK", b"no archive", b"\x93NUMPY\x01\x00"])
def test_files_that_are_no_archives(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "in.npz").write_bytes(content)
    with pytest.raises(UsageError, match=r"in\.npz"):
        parse_inputs([str(tmp_path / "in.npz")])


def test_arrays_that_no_tensor_can_be(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", a=np.array(["text"]))
    with pytest.raises(UsageError, match="torch has no dtype"):
        parse_inputs([str(tmp_path / "in.npz")])


TWO: Any = net("x + y", args="x, y, *, z=None")


def test_names_that_are_arguments_go_there() -> None:
    found = bind(TWO, parse_inputs(["y:1", "x:1"]))
    assert len(found.args) == 2
    assert not found.kwargs
    assert found.names is None
    assert list(found.values) == ["x", "y"]
    assert list(bind(TWO, parse_inputs(["z:1", "x:1"])).kwargs) == ["z"]


def test_other_names_go_by_position_and_become_names_of_the_file() -> None:
    found = bind(TWO, parse_inputs(["left:1", "right:1"]))
    assert len(found.args) == 2
    assert found.names == ("left", "right")
    with pytest.raises(UsageError, match="use those names, or other names for all"):
        bind(TWO, parse_inputs(["x:1", "right:1"]))


def test_axes_that_are_free() -> None:
    inputs = bind(TWO, parse_inputs(["x:1x3", "y:1x3"]))
    assert dynamic_shapes(inputs, [], batch=False) is None
    assert dynamic_shapes(inputs, ["y:1=width"], batch=True) == (
        {0: "batch"},
        {0: "batch", 1: "width"},
    )
    for wrong in ("y", "y:one=n", "q:0=n", "y:2=n", "y:0=1n"):
        with pytest.raises(UsageError, match="--dynamic"):
            dynamic_shapes(inputs, [wrong], batch=False)


def test_a_module_without_arguments_of_its_own() -> None:
    found = bind(nn.Identity(), parse_inputs(["input:2"]))
    assert len(found.args) == 1
