"""What a run that was killed leaves behind goes with the next one; what is in use stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bnfx.workspace import workspace

HOLD = """
import sys, time
from pathlib import Path
from bnfx.workspace import workspace
with workspace(Path(sys.argv[1])) as folder:
    (folder / "half").write_bytes(b"written")
    print(folder, flush=True)
    time.sleep(60)
"""


def left(parent: Path) -> list[str]:
    return [path.name for path in parent.iterdir()]


@pytest.mark.skipif(os.name != "posix", reason="locks as POSIX has them")
def test_the_folder_of_a_killed_run_goes_and_one_in_use_stays(tmp_path: Path) -> None:
    target = tmp_path / "net[1].onnx"
    (tmp_path / ".net[1].onnx.mine").mkdir()  # whatever that is, no run of bnfx made it
    command = [sys.executable, "-c", HOLD, str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        held = Path(other.stdout.readline().strip())
        with workspace(target) as folder:
            assert held.is_dir()
            assert folder.parent == tmp_path
        other.kill()
    assert held.is_dir()
    with workspace(target) as folder:
        assert not held.exists()
        assert folder.is_dir()
    assert left(tmp_path) == [".net[1].onnx.mine"]


def test_folders_do_not_meet(tmp_path: Path) -> None:
    with workspace(tmp_path / "a") as one, workspace(tmp_path / "a") as two:
        assert one != two
        assert one.is_dir()
    with workspace() as elsewhere:
        assert not elsewhere.is_relative_to(tmp_path)
    assert left(tmp_path) == []
