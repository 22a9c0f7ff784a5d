"""A module for the command line to import, and a folder that has it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SMALL = '''
import torch
from torch import nn


class Small(nn.Module):
    """A BatchNorm that folds and, where asked for, one that cannot."""

    def __init__(self, width=4, stubborn=False):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width)
        self.last = nn.BatchNorm2d(width) if stubborn else nn.Identity()

    def forward(self, x):
        return torch.sigmoid(self.last(torch.sigmoid(self.bn(self.conv(x)))))


def small(width=4, stubborn=False):
    torch.manual_seed(0)
    return Small(width, stubborn)


def bare():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
'''
X = ("--input", "x:1x3x8x8")


@contextmanager
def folder_with(path: Path, source: str = SMALL, name: str = "tiny") -> Iterator[Path]:
    """`path` as the current directory, with a module `name` that no other test sees."""
    (path / f"{name}.py").write_text(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setattr(sys, "path", list(sys.path))
        yield path
    sys.modules.pop(name, None)
