"""The public yardstick: bnfx is right on all of it, and what is wrong is called so."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parent.parent / "examples" / "conformance"
sys.path.append(str(FOLDER))


def modules() -> Any:
    import cases
    import run
    import tools

    return cases, run, tools


def wrong(net: nn.Module, _: Tensor, __: Any) -> tuple[Callable[[Tensor], Tensor], int]:
    """A folding that forgets the shift."""
    bn = net.get_submodule("1")
    assert isinstance(bn, nn.BatchNorm2d)
    return lambda x: net(x) - bn.bias.view(-1, 1, 1), 0


def changing(net: nn.Module, x: Tensor, _: Any) -> tuple[Callable[[Tensor], Tensor], int]:
    """One that is right, and changes what it was given."""
    y = net(x)
    net.get_parameter("0.bias").zero_()
    return lambda _: y, 0


def refusing(net: nn.Module, _: Tensor, __: Any) -> tuple[Callable[[Tensor], Tensor], int]:
    raise ValueError(f"no {type(net).__name__}, please")


@pytest.mark.parametrize(
    ("fold", "kind", "says"),
    [
        (wrong, "WRONG", "off by"),
        (changing, "WRONG", "has changed"),
        (refusing, "refused", "no Sequential, please"),
        (lambda net, *_: (net, 1), "right", "1 left"),
        (lambda net, *_: (net, None), "right", "? left"),
    ],
)
def test_outcomes_are_told_apart(fold: Any, kind: str, says: str) -> None:
    cases, run, tools = modules()
    found = run.outcome(tools.Tool("mine", "torch", fold), cases.CASES[0].build)
    assert found[0] == kind
    assert says in found[1]


def test_bnfx_is_right_on_every_case() -> None:
    cases, run, tools = modules()
    found = {case.name: run.outcome(tools.TOOLS[0], case.build) for case in cases.CASES}
    assert {kind for kind, _ in found.values()} <= {"folded", "right"}, found
    assert len({case.name for case in cases.CASES}) == len(cases.CASES)
    assert sum(kind == "folded" for kind, _ in found.values()) >= 24, found


def test_every_case_has_a_batch_norm_that_matters() -> None:
    cases, _, _ = modules()
    for case in cases.CASES:
        net, x = case.build()
        with torch.no_grad():
            before = net(x)
            for module in net.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eps += 3
                    if module.running_var is not None:
                        module.running_var += 3
            assert not torch.allclose(net(x), before), case.name


def test_a_script_stands_alone() -> None:
    command = [sys.executable, "-W", "ignore", str(FOLDER / "run.py"), "--script"]
    command += ["--tool", "torch.fx", "--case", "a convolution called twice"]
    text = subprocess.check_output(command, text=True)
    done = subprocess.check_output(
        [sys.executable, "-W", "ignore", "-c", text], text=True, cwd=FOLDER
    )
    assert "left:" in done


def test_the_page_is_that_of_the_numbers() -> None:
    _, run, _ = modules()
    before = run.PAGE.read_text(encoding="utf-8")
    stored = json.loads((run.RESULTS / "conformance.json").read_text(encoding="utf-8"))
    assert run.page(stored) == before
