"""Files that the command line writes: checked beforehand, moved into place in one step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bnfx.errors import UsageError
from bnfx.workspace import workspace


def check_target(path: Path, suffixes: Sequence[str]) -> None:
    """Refuse a file that could not be written in the end, before any work is done.

    Raises:
        UsageError: Its folder does not exist, it is a folder, a device or a pipe, or its name ends
            in something else.
    """
    if suffixes and path.suffix not in suffixes:
        raise UsageError(f"{path}: its name must end in {', '.join(suffixes)}")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}")
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give the name of a file")
    if suffixes and path.exists() and not path.is_file():
        raise UsageError(f"{path} is a device or a pipe, not to be replaced; give a file")


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path beside `target`, whose file is moved there if the block succeeds.

    Where `target` is a symbolic link, it is the file behind it that is replaced.
    """
    target = target.resolve()
    with workspace(target) as folder:
        written = folder / target.name
        yield written
        if target.exists():
            written.chmod(target.stat().st_mode & 0o777)
        written.replace(target)
