"""One thread and one seed for every test; the marker `gpu` asks onnxruntime before it skips."""

from __future__ import annotations

import os

import pytest
import torch

from bnfx.runtime.sessions import cuda_unavailable_reason


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_configure() -> None:
    torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test marked gpu runs where a node really runs on CUDA, and otherwise says why not."""
    if item.get_closest_marker("gpu") is None:
        return
    reason = cuda_unavailable_reason()
    if reason is None:
        return
    if os.environ.get("BNFX_REQUIRE_GPU") == "1":
        pytest.fail(f"a GPU is required: {reason}")
    pytest.skip(reason)
