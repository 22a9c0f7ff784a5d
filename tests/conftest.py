"""One thread and one seed for every test, golden text, and the marker `gpu`."""

from __future__ import annotations

import os

import pytest
import torch

from bnfx.runtime.availability import cuda_unavailable_reason
from tests.support.golden import FOLDER, Golden


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden text anew")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """The file golden/<pass>/<test>.txt for a test of passes/test_golden_<pass>.py."""
    folder = request.path.stem.removeprefix("test_golden_")
    name = request.node.name.removeprefix("test_")
    return Golden(FOLDER / folder / f"{name}.txt", request.config.getoption("--update-golden"))


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
