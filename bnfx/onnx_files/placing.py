"""Move a graph and its weights into place, so that no reader ever meets one with the wrong other.

Weights beside the graph lie in a file named after their content, `<name>.<hash>.data`, which the
graph names. The weights come first, under a name that nothing reads yet; then the graph is replaced
in one step; then the weights that only the old graph read are removed. Whenever that is
interrupted, the graph that is there reads the weights that it was written with.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from bnfx.errors import ExportError
from bnfx.onnx_files.reading import external_location, stored_tensors

_CHUNK = 1 << 22


def real_target(f: str | os.PathLike[str]) -> Path:
    """The file to replace: where `f` is a symbolic link, what it points to.

    Raises:
        ExportError: It is a folder, a device or a pipe, no name of a file, or its folder does not
            exist.
    """
    try:
        given = Path(f)
        target = given.resolve() if given.is_symlink() else given
        existing = target.stat()
    except (FileNotFoundError, NotADirectoryError):
        existing = None
    except (OSError, TypeError, ValueError) as error:  # too long, not a path, a null character
        raise ExportError(f"{f!r} cannot be the name of a file: {error}") from error
    if not target.parent.is_dir():
        raise ExportError(f"{target.parent} is not a folder; make it before exporting to {given}")
    if target.is_dir():
        raise ExportError(f"{target} is a folder; give the name of a file")
    if existing is not None and not stat.S_ISREG(existing.st_mode):
        raise ExportError(f"{target} is a device or a pipe, not to be replaced; give a file")
    return target


def name_by_content(written: Path) -> None:
    """Rename the weights beside a graph after their content, and let the graph read them there."""
    data = written.with_name(f"{written.name}.data")
    if not data.exists():
        return
    digest = hashlib.blake2b(digest_size=8)
    with data.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    named = f"{written.name}.{digest.hexdigest()}.data"
    model = onnx.load(str(written), load_external_data=False)
    for tensor, _ in stored_tensors(model):
        for entry in tensor.external_data:
            if entry.key == "location" and entry.value == data.name:
                entry.value = named
    written.write_bytes(model.SerializeToString())
    data.rename(data.with_name(named))


def move_into_place(written: Path, target: Path) -> None:
    """Move a graph and its weights to `target`, which keeps the permissions it had.

    Args:
        written: The graph, in a folder on the same file system.
        target: Where it goes; its folder exists.
    """
    weights = data_files(written)
    stale = data_files(target) if target.is_file() else set()
    for path in weights:
        _to_disk(path)
        path.chmod(0o644)
        path.replace(target.with_name(path.name))
    if target.exists():
        shutil.copymode(target, written)
    else:
        written.chmod(0o644)
    _to_disk(written)
    written.replace(target)
    for path in stale - {target.with_name(path.name) for path in weights}:
        path.unlink(missing_ok=True)


def data_files(graph: Path) -> set[Path]:
    """Files of weights beside a graph that are named after it; none where it cannot be read."""
    try:
        model = onnx.load(str(graph), load_external_data=False)
    except (DecodeError, OSError, ValueError):
        return set()
    names = {
        external_location(tensor)[0]
        for tensor, _ in stored_tensors(model)
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    own = {name for name in names if name.startswith(f"{graph.name}.") and Path(name).name == name}
    return {graph.with_name(name) for name in own if graph.with_name(name).is_file()}


def _to_disk(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
