"""A graph and its weights get into place together, or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import bnfx
from bnfx.onnx_files.placing import data_files, move_into_place, name_by_content, real_target


def written(folder: Path, value: float, name: str = "net.onnx") -> Path:
    """A graph y = x + value with its weight beside it, named by content."""
    folder.mkdir(exist_ok=True)
    weight = numpy_helper.from_array(np.full((64, 64), value, np.float32), "w")
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [64, 64]) for n in "xy"]
    node = helper.make_node("Add", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], [weight])
    path = folder / name
    onnx.save(
        helper.make_model(graph),
        str(path),
        save_as_external_data=True,
        location=f"{name}.data",
        size_threshold=0,
    )
    name_by_content(path)
    return path


def value_of(path: Path) -> float:
    """What the weight is, read the way that any reader does."""
    weight = onnx.load(str(path)).graph.initializer[0]
    return float(numpy_helper.to_array(weight)[0, 0])


class Stopped(Exception):
    """The process ends here."""


def _stopping(step: Any, left: Iterator[int]) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        if next(left, None) is None:
            raise Stopped
        return step(*args, **kwargs)

    return run


@pytest.mark.parametrize("older", [False, True])
def test_an_interrupt_at_any_step_leaves_a_graph_with_its_own_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, older: bool
) -> None:
    steps = {name: getattr(Path, name) for name in ("replace", "unlink", "chmod")}
    for at in range(20):
        target = tmp_path / str(at) / "net.onnx"
        target.parent.mkdir()
        if older:
            move_into_place(written(tmp_path / "old", 1.0), target)
        new, left = written(tmp_path / "new", 2.0), iter(range(at))

        with monkeypatch.context() as patch:
            for name, step in steps.items():
                patch.setattr(Path, name, _stopping(step, left))
            try:
                move_into_place(new, target)
            except Stopped:
                done = False
            else:
                done = True
        assert target.exists() or not (older or done)
        if target.exists():
            assert value_of(target) in ((1.0, 2.0) if older and not done else (2.0,))
        if done:
            assert at >= 3
            assert data_files(target) == {*target.parent.glob("*.data")}
            return
    raise AssertionError("it never ended")


def test_equal_weights_have_one_name_and_others_another(tmp_path: Path) -> None:
    a, b, c = (written(tmp_path / n, v) for n, v in (("a", 1.0), ("b", 1.0), ("c", 2.0)))
    names = [next(iter(data_files(path))).name for path in (a, b, c)]
    assert names[0] == names[1] != names[2]


def test_a_graph_over_itself_keeps_its_weights(tmp_path: Path) -> None:
    target = tmp_path / "out" / "net.onnx"
    target.parent.mkdir()
    for _ in range(2):
        move_into_place(written(tmp_path / "new", 3.0), target)
    assert value_of(target) == 3.0
    assert len(list(target.parent.iterdir())) == 2


def test_permissions_stay(tmp_path: Path) -> None:
    target = tmp_path / "net.onnx"
    move_into_place(written(tmp_path / "new", 1.0), target)
    target.chmod(0o600)
    move_into_place(written(tmp_path / "new", 2.0), target)
    assert target.stat().st_mode & 0o777 == 0o600


def test_where_a_link_points_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link.onnx").symlink_to(tmp_path / "real" / "net.onnx")
    assert real_target(tmp_path / "link.onnx") == (tmp_path / "real" / "net.onnx").resolve()


@pytest.mark.parametrize(("name", "says"), [
    ("missing/net.onnx", "is not a folder"),
    (".", "is a folder"),
    ("pipe", "a device or a pipe"),
    ("a" * 5000, "cannot be the name"),
    ("null\0", "cannot be the name"),
])  # fmt: skip
def test_what_no_file_can_be_put_at(tmp_path: Path, name: str, says: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(bnfx.ExportError, match=says):
        real_target(tmp_path / name)


def test_files_of_others_are_not_taken_for_its_own(tmp_path: Path) -> None:
    path = written(tmp_path, 1.0)
    model = onnx.load(str(path), load_external_data=False)
    (tmp_path / "other.data").write_bytes(b"\0" * 64 * 64 * 4)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = "other.data"
    path.write_bytes(model.SerializeToString())
    assert data_files(path) == set()
    path.write_bytes(b"no graph")
    assert data_files(path) == set()
