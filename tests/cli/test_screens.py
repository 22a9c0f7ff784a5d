"""What people see: quiet, at the width there is, with the news in the last line."""

from __future__ import annotations

import fcntl
import importlib
import os
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
import torch

import bnfx
from bnfx.cli import main
from tests.cli.networks import X, folder_with

pytestmark = pytest.mark.skipif(os.name != "posix", reason="terminals as POSIX has them")


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Path]:
    with folder_with(tmp_path):
        yield tmp_path


LAST = [
    (("inspect", "tiny:small"), "1 of 1 BatchNorms folded."),
    (("inspect", "tiny:bare"), "There is no BatchNorm in it."),
    (("insert", "tiny:bare", "b.pt"), "BatchNorm at 1 of 2 affine layers. b.pt has the state dict"),
    (("fold", "tiny:small"), "Nothing was written"),
    (("fold", "tiny:small", "s.pt2", *X), "torch.export.load('s.pt2')"),
    (("fold", "tiny:small", "s.safetensors"), "safetensors.torch.load_file('s.safetensors')"),
    (("export", "tiny:small", "a.onnx", *X), "To verify it: bnfx verify tiny:small a.onnx --input"),
    (
        ("deploy", "tiny:small", "a.onnx", *X),
        "a.onnx is in place; it computes what Small computes.",
    ),
    (("fold", "tiny:small(stubborn=True)", "--require-folded"), "policy: 1 BatchNorms stay"),
    (("deploy", "tiny:small", "a.onnx", *X, "--max-ratio", "1e-9"), "was not written"),
]


@pytest.mark.parametrize(("argv", "news"), LAST)
def test_the_news_is_the_last_line(
    here: Path, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], news: str
) -> None:
    code = main(argv)
    out, err = capsys.readouterr()
    assert news in out.splitlines()[-1]
    told = [line for line in err.splitlines() if not line.startswith("bnfx: ")]
    assert not told, "neither warnings nor logs of the libraries"
    assert main([*argv, "--quiet"]) == code
    quiet, err = capsys.readouterr()
    assert quiet.splitlines() == out.splitlines()[-1:]
    assert bool(err) == bool(code)


def test_inspect_is_titled_inspect(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "tiny:bare", "--html", "i.html", "--markdown", "i.md"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("inspect tiny:bare\n")
    assert "no BatchNorm" in out
    assert "<title>bnfx: inspect tiny:bare</title>" in (here / "i.html").read_text()
    assert (here / "i.md").read_text().startswith("# bnfx: inspect tiny:bare\n")


def test_a_limit_stands_beside_every_figure(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "tiny:small", "a.onnx", *X]) == 0
    capsys.readouterr()
    assert main(["verify", "tiny:small", "a.onnx", *X]) == 0
    out = capsys.readouterr().out
    for tier in ("weights", "layers", "outputs"):
        assert re.search(rf"{tier}: passed, \d+ of \d+, worst \S+ of \d+", out)
    assert re.search(r"\d of 4 +passed", out)
    assert [line for line in out.splitlines() if line.startswith("budget: ")]


def test_deploy_says_whose_weights_they_are(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["deploy", "tiny:small", "a.onnx", *X]) == 0
    assert (
        "no --checkpoint: these are the weights that the factory makes" in capsys.readouterr().err
    )


def test_verbose_shows_every_row_and_the_warnings(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = "import warnings\nwarnings.warn('a warning\\x1b[2J of a library')\n"
    (here / "tiny.py").write_text(source + (here / "tiny.py").read_text())
    argv = ["deploy", "tiny:small", "a.onnx", *X]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert "a warning" not in err
    assert "folded" not in out, "what bnfx folded needs no look"
    sys.modules.pop("tiny")
    assert main([*argv, "-v"]) == 0
    out, err = capsys.readouterr()
    assert r"UserWarning: a warning\x1b[2J of a library" in err
    assert re.search(r"bn +folded +conv", out)


def on_terminal(columns: int, *argv: str, **environment: str) -> str:
    """What a command shows on a terminal so wide; standard error goes elsewhere."""
    import pty

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    inherited = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    command = [sys.executable, "-m", "bnfx", *argv]
    with subprocess.Popen(
        command, stdout=theirs, stderr=subprocess.DEVNULL, env={**inherited, **environment}
    ) as process:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 1 << 16):
                shown += part
        except OSError:  # how Linux says that it is closed
            pass
    os.close(ours)
    assert process.returncode == 0
    return shown.decode().replace("\r\n", "\n")


def test_tables_take_the_width_there_is(here: Path) -> None:
    argv = ("fold", "tiny:small(stubborn=True)")
    narrow, wide = on_terminal(80, *argv), on_terminal(200, *argv)
    piped = subprocess.run(
        [sys.executable, "-m", "bnfx", *argv], capture_output=True, text=True, check=True
    ).stdout
    assert max(map(len, narrow.splitlines())) <= 80 < max(map(len, wide.splitlines()))
    reason = "whose values stay and behind it by sigmoid 'sigmoid_1'"
    assert reason not in narrow
    assert reason in wide
    assert reason in piped, "a pipe has no width"
    assert "\x1b" not in narrow + wide + piped, "colours are for nobody here"
    assert on_terminal(0, *argv, NO_COLOR="1")


def test_another_checkpoint_is_told_as_such(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "tiny:small", "a.onnx", *X, "--fold"]) == 0
    capsys.readouterr()
    source = (here / "tiny.py").read_text()
    (here / "tiny.py").write_text(source.replace("manual_seed(0)", "manual_seed(1)"))
    sys.modules.pop("tiny")
    assert main(["verify", "tiny:small", "a.onnx", *X]) == 1
    out, err = capsys.readouterr()
    assert "every weight differs: another checkpoint?" in err
    assert "over 1e6 of 8" in out


def test_pixels_go_into_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = ("--input", "x:1x3x8x8:uint8")
    with folder_with(tmp_path):
        wanted = ("--input-scale", "1/255", "--input-mean", "0.5,0.4,0.3", "--input-std", ".2")
        assert main(["deploy", "tiny:small", "s.onnx", *pixels, *wanted]) == 0
        assert [i.type.tensor_type.elem_type for i in onnx.load("s.onnx").graph.input] == [
            onnx.TensorProto.UINT8
        ]
        capsys.readouterr()
        assert main(["deploy", "tiny:small", "t.onnx", *pixels, "--input-mean", "1,2"]) == 2
        assert "3 channels" in capsys.readouterr().err
        assert main(["deploy", "s.onnx", "t.onnx", "--input-scale", "1/255"]) == 2


def test_the_form_of_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with folder_with(tmp_path) as folder:
        assert main(["fold", "tiny:small", "s.pt", *X, "--form", "module"]) == 0
        net = importlib.import_module("tiny").small().eval()
        folded = bnfx.fold_bn(net, form="module")
        folded.load_state_dict(torch.load(folder / "s.pt"), strict=True)
        assert type(folded) is type(net)
        assert main(["insert", "tiny:bare", "b.pt", "--form", "graph"]) == 0
        assert "0_bn.weight" in torch.load(folder / "b.pt")
        assert main(["insert", "tiny:bare", "b.pt"]) == 0
        assert "0.bn.weight" in torch.load(folder / "b.pt")
        assert main(["deploy", "tiny:small", "s.onnx", *X, "--form", "module"]) == 0
        assert main(["fold", "s.onnx", "t.onnx", "--form", "module"]) == 2
        assert "--form" in capsys.readouterr().err
