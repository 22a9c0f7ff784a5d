"""The example of CONTRIBUTING.md, "How to add a command", carried out on a copy of the code."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.worked_examples import run_example


@pytest.mark.parametrize("carried_out", [True, False])
def test_worked_example(tmp_path: Path, *, carried_out: bool) -> None:
    done = run_example("How to add a command", tmp_path, carried_out=carried_out)
    assert (done.returncode == 0) is carried_out, done.stderr
    if not carried_out:
        assert "invalid choice: 'nodes'" in done.stderr
