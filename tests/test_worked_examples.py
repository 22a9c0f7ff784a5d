"""The examples of CONTRIBUTING.md, "How to add ...", carried out on a copy of the code."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.worked_examples import run_example

#: What is added -> what its check says where the edits were not made.
ADDED = {
    "an operator": "AssertionError",  # without the rows the BatchNorm stays
    "a command": "invalid choice: 'nodes'",
    "a check": "AssertionError",
}


@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("carried_out", [True, False])
def test_worked_example(tmp_path: Path, added: str, *, carried_out: bool) -> None:
    done = run_example(f"How to add {added}", tmp_path, carried_out=carried_out)
    assert (done.returncode == 0) is carried_out, done.stderr
    if not carried_out:
        assert ADDED[added] in done.stderr
