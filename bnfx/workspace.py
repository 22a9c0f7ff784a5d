"""Folders for what is needed for a while only, and the removal of those that a killed run left."""

from __future__ import annotations

import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LOCK = ".lock"


@contextmanager
def workspace(beside: Path | None = None) -> Iterator[Path]:
    """A folder that is gone at the end, and one of this kind that a killed run left goes with it.

    Whoever works in a folder holds a lock on a file in it, which ends with the process however that
    ends: what nobody holds any more is removed.

    Args:
        beside: The file that will be replaced by one of the folder: a move within one file system
            is one step. None takes the folder of temporary files.
    """
    parent = Path(tempfile.gettempdir()) if beside is None else beside.parent
    # A name may be as long as a name can be.
    prefix = "bnfx-" if beside is None else f".{beside.name[:60]}."
    _sweep(parent, prefix)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=parent) as name, _locked(Path(name)):
        yield Path(name)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    if sys.platform == "win32":
        yield
        return
    import fcntl

    unlocked = folder / "unlocked"
    with unlocked.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: a killed run's folder stays there
            unlocked.unlink()
        else:
            unlocked.rename(folder / _LOCK)  # now locked, it may be seen
        yield


def _sweep(parent: Path, prefix: str) -> None:
    if sys.platform == "win32":
        return
    import fcntl

    for lock in parent.glob(f"{glob.escape(prefix)}*/{_LOCK}"):
        folder = lock.parent
        try:
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            with lock.open("r+") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # somebody works there, or has just removed it
            continue
