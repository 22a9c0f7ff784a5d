"""Tensors in mapped files: the same numbers, and next to no memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from bnfx.graphs.mapped import mapped_into, unfilled, unload

LARGE = torch.Size((64, 1024, 64))  # 16 MiB of float32


def anonymous() -> int:
    """Bytes of this process that no file holds."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def test_large_tensors_keep_their_values_in_files(tmp_path: Path) -> None:
    with mapped_into(tmp_path):
        first = unfilled(LARGE, torch.float32).fill_(1.5)
        second = unfilled(LARGE, torch.float64).fill_(-2.5)
        unload()
        small = unfilled(torch.Size((2, 3)), torch.float32)
    assert not list(tmp_path.iterdir())  # what nothing holds any more is gone
    assert small.shape == (2, 3)
    assert bool((first == 1.5).all())
    assert bool((second == -2.5).all())
    assert second.dtype is torch.float64
    assert unfilled(LARGE, torch.float32).shape == LARGE


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_they_take_no_memory_of_their_own(tmp_path: Path) -> None:
    before = anonymous()
    with mapped_into(tmp_path):
        held = [unfilled(LARGE, torch.float32).fill_(at) for at in range(8)]
    assert anonymous() - before < LARGE.numel() * 4
    assert [float(tensor[-1, -1, -1]) for tensor in held] == list(range(8))
