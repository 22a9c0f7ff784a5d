"""Models by the names of libraries, completion, and what is said to a typing error."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bnfx.cli import main
from bnfx.cli.models import load_model
from bnfx.cli.specs import parse_factory
from tests.support import zoo


@pytest.mark.zoo
@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        ("timm:resnet10t", "ResNet"),
        ("timm:resnet10t.c3_in1k(num_classes=7)", "ResNet"),
        ("timm:create_model('resnet10t')", "ResNet"),
        ("torchvision:resnet18", "ResNet"),
        ("torchvision.models:resnet18(num_classes=3)", "ResNet"),
        ("transformers:resnet(depths=[1,1,1,1])", "ResNetModel"),
        ("transformers:ResNetForImageClassification(depths=[1,1,1,1])", "ResNetForImageCl"),
    ],
)
def test_a_name_gives_the_same_weights_each_time(spec: str, kind: str) -> None:
    zoo.timm()
    pytest.importorskip(spec.partition(":")[0])
    state = torch.random.get_rng_state()
    first, second = (load_model(spec).model for _ in range(2))
    assert type(first).__name__.startswith(kind)
    again = second.state_dict()
    if "create_model" not in spec and "models:" not in spec:  # those are calls like any other
        assert torch.equal(state, torch.random.get_rng_state())
        assert all(torch.equal(t, again[name]) for name, t in first.state_dict().items())


def test_names_of_libraries_need_not_be_those_of_python() -> None:
    found = parse_factory("transformers:google/bit-50(num_labels=3)")
    assert (".".join(found.path), found.kwargs) == ("google/bit-50", {"num_labels": 3})


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["fol", "a:b"], 2, "did you mean fold?"),
        (["fold", "a:b", "--treshold"], 2, "did you mean --thresholds"),
        (["fold", "json:dump(0)"], 2, "the factory failed"),
        (["fold", "json:dumbs"], 2, "did you mean dumps or dump?"),
        (["fold", "json:zzzzz"], 2, "has no attribute 'zzzzz'\n"),
        (["fold", "timm:resnet10u"], 2, "did you mean resnet"),
        (["fold", "torchvision:resnet19"], 2, "did you mean resnet"),
        (["fold", "transformers:resnett"], 2, "did you mean resnet"),
    ],
)
def test_what_was_meant(
    argv: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if argv[1].partition(":")[0] in ("timm", "torchvision", "transformers"):
        zoo.timm()
        pytest.importorskip(argv[1].partition(":")[0])
    assert main(argv) == code
    assert says in capsys.readouterr().err


def test_a_library_that_is_missing_is_code_3(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    assert main(["fold", "timm:resnet18"]) == 3
    assert "needs the package timm" in capsys.readouterr().err


def test_completion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab", reason="shtab is not installed: pip install bnfx[shell]")
    for shell in ("bash", "zsh"):
        assert main(["--print-completion", shell]) == 0
        text = capsys.readouterr().out
        assert "--max-batch-norms-left" in text
        if shutil.which(shell) and shell == "bash":
            script = tmp_path / "completion"
            ask = 'COMP_WORDS=(bnfx fold --thr); COMP_CWORD=2; _shtab_bnfx; echo "${COMPREPLY[@]}"'
            script.write_text(f"{text}\n{ask}\n")
            done = subprocess.run([shell, script], capture_output=True, text=True, check=True)
            assert done.stdout.strip() == "--thresholds"
