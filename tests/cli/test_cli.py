"""The command line, mostly in this process: every exit code, clean JSON, older files left alone."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import bnfx
from bnfx.cli import main, parser
from bnfx.runtime.availability import cuda_unavailable_reason

NETS = '''
import time
import torch
from torch import nn


class Small(nn.Module):
    """Two BatchNorms that fold and, where asked for, one that cannot."""

    def __init__(self, width=8, stubborn=False):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width)
        self.more, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.last = nn.BatchNorm2d(width) if stubborn else nn.Identity()
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        y = torch.relu(self.bn(self.conv(x)))
        y = torch.relu(self.bn2(self.more(y)))
        return self.head(torch.sigmoid(self.last(torch.sigmoid(y))).mean((2, 3)))


def small(width=8, stubborn=False):
    print("noise on standard output")
    torch.manual_seed(0)
    net = Small(width, stubborn)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
    return net


def plain():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 10))


class Branches(nn.Module):
    """Two convolutions that are added: one, unless they are to stay apart."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return torch.relu(self.bn(self.a(x) + self.b(x)))


class Loop(nn.Module):
    def forward(self, x):
        while x.sum() > 0:
            x = x - 1
        return x


def number():
    return 7


def leaving():
    raise SystemExit(0)


def broken():
    raise ValueError("no such weights")


def slow():
    print("started", flush=True)
    time.sleep(60)
'''

X = ("--input", "x:1x3x16x16")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current directory with a module `nets`, which no other test sees."""
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "needy.py").write_text("import a_package_that_nobody_has\n")
    (tmp_path / "faulty.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("nets", "needy", "faulty"):
        sys.modules.pop(name, None)


def strict(text: str) -> Any:
    """JSON by the standard: no NaN, no Infinity, nothing around it."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def commands_in_help() -> list[tuple[str, list[str]]]:
    names = list(parser._COMMANDS)
    return [(name, parser._COMMANDS[name][1].strip().splitlines()) for name in names]


@pytest.mark.parametrize(("command", "lines"), commands_in_help())
def test_the_examples_in_the_help_run(
    here: Path, capsys: pytest.CaptureFixture[str], command: str, lines: list[str]
) -> None:
    assert lines, command
    for line in lines:
        program, *argv = shlex.split(line)
        assert program == "bnfx"
        assert main(argv) == 0, capsys.readouterr().err
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(line.strip() in shown for line in lines)
    assert "exit codes:" in shown
    assert [path.name for path in here.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        ((), 2, "COMMAND"),
        (("fly",), 2, "invalid choice"),
        (("fold",), 2, "MODEL"),
        (("fold", "nets"), 2, "neither PACKAGE.MODULE:FACTORY"),
        (("fold", "nets.py:small"), 2, "neither PACKAGE.MODULE:FACTORY"),
        (("fold", "absent:small"), 2, "no module 'absent'"),
        (("fold", "nets.absent:small"), 2, "no module 'nets.absent'"),
        (("fold", "nets:absent"), 2, "absent"),
        (("fold", "nets:number"), 2, "returned a int"),
        (("fold", "nets:torch.pi"), 2, "is a float, not a factory"),
        (("fold", "nets:broken"), 2, "ValueError: no such weights"),
        (("fold", "nets:leaving"), 2, "SystemExit(0)"),
        (("fold", "nets:small(width=x)"), 2, "literal arguments"),
        (("fold", "nets:small(wide=3)"), 2, "wide"),
        (("fold", "faulty:net"), 2, "ZeroDivisionError"),
        (("fold", "absent.pt2"), 2, "no file absent.pt2"),
        (("fold", "nets:small", "--checkpoint", "absent.pt"), 2, "no checkpoint"),
        (("fold", "nets:small", "out.txt"), 2, "must end in .pt2"),
        (("fold", "nets:small", "absent/out.pt2"), 2, "no folder absent"),
        (("fold", "nets:small", "out.pt2"), 2, "needs example inputs"),
        (("fold", "nets:small", "--json", "absent/r.json"), 2, "no folder absent"),
        (("fold", "nets:small", "--markdown", "-", "--html", "-"), 2, "only one report"),
        (("fold", "nets:small", "--max-batch-norms-left", "-1"), 2, "argument"),
        (("fold", "nets:small", "--input", "x"), 2, "has not the form"),
        (("fold", "nets:small", "--input", "x:3x"), 2, "is no shape"),
        (("fold", "nets:small", "--input", "x:3:float31"), 2, "float31"),
        (("fold", "nets:small", "--input", "x:3:int64:5..1"), 2, "is no range"),
        (("fold", "nets:small", "--input", "x:99999x99999x9"), 2, "GiB"),
        (("fold", "nets:small", "--input", "absent.npz"), 2, "no file absent.npz"),
        (("fold", "nets:small", *X, *X), 2, "twice"),
        (("fold", "nets:small", *X, "--input", "z:1"), 2, "'z' is no argument"),
        (("fold", "nets:small", "--input", "x:1x5x16x16"), 2, "does not take these inputs"),
        (("fold", "nets:small", *X, "--dynamic", "x:0"), 2, "NAME:AXIS=SYMBOL"),
        (("fold", "nets:small", *X, "--dynamic", "z:0=n"), 2, "no input 'z'"),
        (("fold", "nets:small", *X, "--dynamic", "x:4=n"), 2, "4 axes"),
        (("verify", "nets:small", "absent.onnx", *X), 2, "no file absent.onnx"),
        (("verify", "nets:small", "a.onnx", "--provider", "tpu"), 2, "tpu"),
        (("verify", "nets:small", "a.onnx", "--batch-sizes", "1,0"), 2, "nothing to verify on"),
        (("verify", "nets:small", "a.onnx", "--num-inputs", "0"), 2, "nothing to verify on"),
        (("verify", "nets:small", "a.onnx", "--max-ratio", "inf"), 2, "is no limit"),
        (("verify", "nets:small", "a.onnx", "--max-ratio", "nan"), 2, "is no limit"),
        (("export", "nets:small", "a.onnx"), 2, "needs example inputs"),
        (("bench", "absent.onnx"), 2, "no file absent.onnx"),
        (("inspect", "absent.onnx"), 2, "no file absent.onnx"),
        (("verify", "absent.onnx", "nets.py", *X), 2, "no file absent.onnx"),
        (("fold", "needy:net"), 3, "a_package_that_nobody_has"),
        (("fold", "nets:Loop"), 4, "CaptureError"),
        (("export", "nets:small", "a.onnx", *X, "--opset", "9"), 2, "--opset 9"),
        (("export", "nets:Loop", "a.onnx", "--input", "x:3"), 4, "ExportError"),
        (("export", "nets:small", "a.onnx", *X, "--thresholds"), 2, "need --fold"),
        (
            ("deploy", "nets:small", "a.onnx", *X, "--batch-sizes", "1,4"),
            2,
            "the batch of the file",
        ),
        (("insert", "nets:plain", "--init", "calibrate"), 2, "--calibration"),
        (("insert", "nets:plain", *X, "--calibration", "nets.py"), 2, "no data"),
        (("insert", "nets:plain", "--include", "absent*"), 2, "fits no layer"),
        (("insert", "nets:plain", "--exclude", "absent*"), 2, "fits no layer"),
        (("fold", "nets:small", "--input", "x:0x3x16x16"), 2, "is empty"),
        (("bench", "nets:small", *X, "--num-runs", "10"), 2, "too few"),
        (("fold", "nets:small", "-q", "-v"), 2, "not allowed with"),
        (("fold", "nets:small", "--checkpoint-key", "ema"), 2, "needs a --checkpoint"),
        (("fold", "nets:small", f"{'n' * 300}.pt"), 2, "cannot be the name of a file"),
        (("export", "nets:small", "a.onnx", *X, *("--output-name", "") * 2), 2, "no names"),
        (("fold", "nets:nn.LazyConv2d(3,1)"), 4, "CaptureError: 'weight' has no shape yet"),
        (("insert", "nets:Small.forward"), 2, "factory failed"),
        (("inspect", "nets:small(stubborn=True)", "--require-folded"), 1, "policy"),
        (("fold", "nets:small(stubborn=True)", "--max-batch-norms-left", "0"), 1, "policy"),
        (("fold", "nets:small(stubborn=True)", "--max-batch-norms-left", "1"), 0, ""),
    ],
)
def test_exit_codes(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    argv: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    before = sorted(here.iterdir())
    assert main(argv) == code, capsys.readouterr().err
    out, err = capsys.readouterr()
    assert message in err, err
    assert "Traceback" not in err
    assert (out == "") == (code not in (0, 1)), (
        "a result goes to standard output, an error does not"
    )
    assert [path for path in sorted(here.iterdir()) if path.name != "__pycache__"] == [
        path for path in before if path.name != "__pycache__"
    ]


@pytest.mark.parametrize(
    "argv",
    [
        ("fold", "absent:small"),
        ("fold", "nets:small", "--input", "x:0x3x16x16"),
        ("deploy", "nets:small", "a.onnx", *X, "--batch-sizes", "1,4"),
        ("deploy", "nets:small", "a.onnx", *X, "--opset", "11"),
        ("deploy", "nets:small", "a.onnx", *X, "--checkpoint", "absent.pt"),
        ("insert", "nets:plain", "--init", "calibrate"),
        ("verify", "nets:small", "nets.py"),
    ],
)
def test_wrong_arguments_are_found_before_torch_is_imported(
    here: Path, argv: tuple[str, ...]
) -> None:
    code = (
        "import sys\nfrom bnfx.cli import main\ncode = main(sys.argv[1:])\n"
        "print(*sys.modules, sep=chr(10))\nsys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], cwd=here, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert not {"torch", "onnx", "onnxruntime"} & set(done.stdout.split())


def test_an_archive_that_inflates_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        zipfile.ZipFile(here / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("x.npy", "w") as stream,
    ):
        for _ in range(300):
            stream.write(bytes(1 << 20))
    assert (here / "x.npz").stat().st_size < 1 << 20
    assert main(["fold", "nets:small", "--input", "x.npz"]) == 2
    assert "inflates to" in capsys.readouterr().err


def test_a_full_disk_is_told_and_leaves_the_older_file(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit on the size of files stands for a full disk: torch's own writer aborts on both."""
    code = (
        "import resource, signal, sys\nfrom bnfx.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\nsys.exit(main(sys.argv[1:]))"
    )
    for name in ("a.pt2", "a.pt", "a.safetensors"):
        (here / name).write_bytes(b"older")
        done = subprocess.run(
            [sys.executable, "-c", code, "fold", "nets:small", name, *X],
            cwd=here,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 4, done.stderr
        assert "File too large" in done.stderr
        assert (here / name).read_bytes() == b"older"
        assert not list(here.glob(".a*"))


@pytest.fixture(scope="session")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`nets:small`, folded and exported by the command line, once for all tests."""
    folder = tmp_path_factory.mktemp("right")
    (folder / "nets.py").write_text(NETS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        assert main(["export", "nets:small", "a.onnx", "--fold", *X, "--dynamic-batch"]) == 0
    sys.modules.pop("nets")
    return folder / "a.onnx"


@pytest.fixture
def exported(here: Path, right: Path) -> Path:
    """A copy of that file in the current directory."""
    return Path(shutil.copy(right, here / "a.onnx"))


def test_json_is_all_there_is_on_standard_output(
    here: Path, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found: dict[str, Any] = {}
    for argv in (
        ["inspect", "nets:small"],
        ["inspect", "nets:small", *X],
        ["inspect", "a.onnx"],
        ["insert", "nets:plain"],
        ["verify", "nets:small", "a.onnx", *X],
        ["bench", "a.onnx", "--num-runs", "50"],
        ["deploy", "nets:small", "b.onnx", *X],
        ["verify", "nets:small(width=4)", "a.onnx", *X],
        ["fold", "nets:Loop"],
    ):
        code = main([*argv, "--json", "-"])
        out, err = capsys.readouterr()
        content = strict(out)
        assert (content["command"], content["exit_code"]) == (argv[0], code)
        found[" ".join(argv[:2])] = content
        if "nets:small" in argv[1]:
            assert "noise on standard output" in err
    assert [bn["verdict"] for bn in found["inspect nets:small"]["fold"]["batch_norms"]] == [
        "folded",
        "folded",
    ]
    assert found["inspect a.onnx"]["stages"]["left"]["source"] == 0
    assert found["insert nets:plain"]["sites"][0]["action"] == "inserted"
    assert found["verify nets:small"]["status"] == "passed"
    assert found["deploy nets:small"]["status"] == "deployed"
    assert found["verify nets:small(width=4)"]["exit_code"] == 1
    assert found["fold nets:Loop"]["error"] == "CaptureError"


def test_json_keeps_numbers_that_are_not_finite(
    here: Path, exported: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    f = exported
    change(f, "conv.weight", np.nan)
    capfd.readouterr()
    assert main(["verify", "nets:small", "a.onnx", *X, "--json", "-"]) == 1
    content = strict(capfd.readouterr().out)
    assert {weight["ratio"] for weight in content["weights"]} >= {"Infinity"}


def change(f: Path, name: str, value: float) -> None:
    proto = onnx.load(str(f))
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    array = onnx.numpy_helper.to_array(tensor).copy()
    array.flat[0] = value
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))
    onnx.save(proto, str(f))


def test_a_tampered_file_fails_and_says_where(
    here: Path, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    f = exported
    assert main(["verify", "nets:small", "a.onnx", *X, "--require-folded"]) == 0
    change(f, "conv.weight", 0.5)
    assert main(["verify", "nets:small", "a.onnx", *X]) == 1
    assert "conv.weight" in capsys.readouterr().err


def test_one_file_against_another(
    here: Path, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    f = exported
    shutil.copy(f, here / "b.onnx")
    for inputs in ((), X, ("--input", "image:1x3x16x16")):
        assert main(["verify", "a.onnx", "b.onnx", *inputs]) == 0, capsys.readouterr().err
    assert main(["verify", "a.onnx", "b.onnx", *X, "--input", "z:3"]) == 2
    for wrong in ("x:1x3x17x16", "x:1x3x16x16:int64", "x:3x16x16"):
        assert main(["verify", "a.onnx", "b.onnx", "--input", wrong]) == 2
        assert main(["bench", "a.onnx", "--input", wrong]) == 2
    half = ["--input", "x:1x3x16x16:float16"]
    assert main(["verify", "a.onnx", "b.onnx", *half]) == 0, "it goes in as float32"
    assert main(["bench", "a.onnx", *half]) == 2
    assert main(["verify", "a.onnx", "b.onnx", "--checkpoint", "c.pt", *X]) == 2
    change(here / "b.onnx", "conv.weight", 0.5)
    assert main(["verify", "a.onnx", "b.onnx"]) == 1


def test_inspect_lists_what_onnxruntime_cannot_load(
    here: Path, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    f = exported
    proto = onnx.load(str(f))
    next(node for node in proto.graph.node if node.op_type == "Relu").domain = "of.nobody"
    proto.opset_import.append(onnx.helper.make_opsetid("of.nobody", 1))
    onnx.save(proto, str(f))
    capsys.readouterr()
    assert main(["inspect", "a.onnx"]) == 1
    out, err = capsys.readouterr()
    assert "a.onnx: written by" in out
    assert "not a registered function" in err


@pytest.mark.parametrize("content", [b"", b"garbage", None])
@pytest.mark.parametrize(
    "argv", [("verify", "nets:small", "a.onnx", *X), ("inspect", "a.onnx"), ("bench", "a.onnx")]
)
def test_an_unreadable_file_fails(
    here: Path,
    exported: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes | None,
    argv: tuple[str, ...],
) -> None:
    f = here / "a.onnx"
    f.write_bytes(exported.read_bytes()[:-500] if content is None else content)
    capsys.readouterr()
    assert main(argv) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "a.onnx" in err
    assert "Traceback" not in err


def test_other_unreadable_files(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.pt2", "a.pt", "a.safetensors", "a.npz"):
        (here / name).write_bytes(b"garbage")
    np.savez(here / "objects.npz", x=np.array([{}], dtype=object), allow_pickle=True)
    torch.save({"hook": print}, here / "code.pt")
    torch.save([1, 2], here / "list.pt")
    torch.save({"conv.weight": torch.zeros(1)}, here / "other.pt")
    for argv, code, message in (
        (["fold", "a.pt2"], 4, "a.pt2 is not a readable file"),
        (["fold", "nets:small", "--checkpoint", "a.pt"], 2, "a.pt cannot be read"),
        (["fold", "nets:small", "--checkpoint", "a.safetensors"], 2, "cannot be read"),
        (["fold", "nets:small", "--checkpoint", "code.pt"], 2, "save model.state_dict()"),
        (["fold", "nets:small", "--checkpoint", "list.pt"], 2, "holds a list"),
        (["fold", "nets:small", "--checkpoint", "other.pt"], 2, "does not fit Small"),
        (["fold", "nets:small", "--input", "a.npz"], 2, "not a readable .npz"),
        (["fold", "nets:small", "--input", "objects.npz"], 2, "not a readable .npz"),
    ):
        assert main(argv) == code
        out, err = capsys.readouterr()
        assert message in err
        assert "Traceback" not in err
        assert out == ""


def test_missing_cuda_is_code_3(
    here: Path, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if cuda_unavailable_reason() is None:
        pytest.skip("CUDA works here")
    (here / "b.onnx").write_bytes(b"older")
    for argv in (
        ["verify", "nets:small", "a.onnx", *X, "--provider", "cuda"],
        ["deploy", "nets:small", "b.onnx", *X, "--provider", "cuda"],
        ["doctor", "--require", "cuda"],
    ):
        assert main(argv) == 3
        assert "CUDA" in capsys.readouterr().err
    assert (here / "b.onnx").read_bytes() == b"older"


@pytest.mark.parametrize(
    "argv",
    [
        ("deploy", "nets:small", "old.onnx", *X, "--max-ratio", "1e-9"),
        ("deploy", "nets:small(stubborn=True)", "old.onnx", *X, "--require-folded"),
        ("deploy", "nets:small", "old.onnx", *X, "--opset", "9"),
        ("export", "nets:small", "old.onnx", *X, "--opset", "9"),
        ("fold", "nets:small(stubborn=True)", "old.pt2", *X, "--require-folded"),
        ("fold", "nets:Loop", "old.pt2", "--input", "x:3"),
        ("insert", "nets:small", "old.safetensors", "--init", "calibrate"),
    ],
)
def test_a_failure_leaves_the_older_file(here: Path, argv: tuple[str, ...]) -> None:
    older = here / argv[2]
    older.write_bytes(b"older")
    assert main(argv) in (1, 2, 4)
    assert older.read_bytes() == b"older"
    left = {path.name for path in here.iterdir()} - {"__pycache__"}
    assert left == {"nets.py", "needy.py", "faulty.py", older.name}


@pytest.mark.parametrize(
    "reports",
    [("--json", "./a.onnx"), ("--html", "nets.npz"), ("--json", "r", "--markdown", "r")],
)
def test_a_report_overwrites_no_other_file(here: Path, reports: tuple[str, ...]) -> None:
    np.savez(here / "nets.npz", x=np.ones((1, 3, 16, 16), np.float32))
    (here / "a.onnx").write_bytes(b"older")
    before = {path.name: path.read_bytes() for path in here.iterdir() if path.is_file()}
    assert main(["deploy", "nets:small", "a.onnx", "--input", "nets.npz", *reports]) == 2
    assert {p.name: p.read_bytes() for p in here.iterdir() if p.is_file()} == before


def test_reports_go_into_pipes_and_leave_them(here: Path) -> None:
    os.mkfifo(here / "pipe")
    reader = os.open(here / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    assert main(["fold", "nets:small", "--json", "pipe"]) == 0
    with os.fdopen(reader) as stream:
        assert strict(stream.read())["exit_code"] == 0
    assert (here / "pipe").is_fifo()
    os.mkfifo(here / "pipe.onnx")
    assert main(["deploy", "nets:small", "pipe.onnx", *X]) == 2
    assert (here / "pipe.onnx").is_fifo()


def test_a_failed_deploy_writes_its_reports_and_its_bundle(here: Path) -> None:
    reports = ["--json", "r.json", "--markdown", "r.md", "--html", "r.html", "--bundle", "kept"]
    argv = ["deploy", "nets:small", "a.onnx", *X, "--max-ratio", "1e-9", *reports]
    assert main(argv) == 1
    assert strict((here / "r.json").read_text())["status"] == "failed"
    assert "Failed." in (here / "r.md").read_text()
    assert "Failed." in (here / "r.html").read_text()
    assert (here / "kept" / "inputs.npz").is_file()
    assert not (here / "a.onnx").exists()


def test_what_is_folded_is_saved(here: Path) -> None:
    assert main(["fold", "nets:small", "a.pt2", *X, "--dynamic-batch"]) == 0
    assert main(["fold", "nets:small", "a.safetensors"]) == 0
    small = importlib.import_module("nets").small

    x = torch.randn(5, 3, 16, 16)
    truth = small().eval()(x)
    program = torch.export.load("a.pt2").module()
    torch.testing.assert_close(program(x), truth, rtol=1e-4, atol=1e-5)
    from safetensors.torch import load_file

    assert not [name for name in load_file("a.safetensors") if "running" in name]


def test_pt2_files_go_all_the_way_with_their_own_inputs(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fold", "nets:small", "a.pt2", *X, "--dynamic-batch"]) == 0
    assert main(["deploy", "a.pt2", "a.onnx", "--json", "r.json"]) == 0, capsys.readouterr().err
    report = strict((here / "r.json").read_text())
    places = {report[part]["path"] for part in ("export", "verify")} | {report["path"]}
    assert places == {"a.onnx"}, "not the temporary files of the checks"
    assert report["export"]["inputs"] == {"x": "float32[batch,3,16,16]"}
    assert set(report["verify"]["batch_sizes"]) == {1, 2, 7}


@pytest.mark.parametrize("by_keyword", [False, True])
def test_pt2_files_with_nested_inputs(here: Path, *, by_keyword: bool) -> None:
    sys.path.insert(0, str(here))
    nets = importlib.import_module("nets")

    class Nested(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nets.small()

        def forward(self, pair: dict[str, torch.Tensor], k: float = 1.0) -> dict[str, torch.Tensor]:
            return {"y": self.net(pair["a"] + pair["b"]) * k}

    pair = {name: torch.randn(2, 3, 16, 16) for name in "ab"}
    free = {name: {0: torch.export.Dim("n")} for name in "ab"}
    args, kwargs = ((), {"pair": pair}) if by_keyword else ((pair,), None)
    program = torch.export.export(Nested().eval(), args, kwargs, dynamic_shapes={"pair": free})
    torch.export.save(program, here / "a.pt2")
    assert main(["deploy", "a.pt2", "a.onnx", "--require-folded", "--json", "r.json"]) == 0
    shapes = strict((here / "r.json").read_text())["export"]["inputs"].values()
    assert list(shapes) == ["float32[batch,3,16,16]"] * 2
    assert main(["fold", "a.pt2", "b.pt2"]) == 0
    folded = torch.export.load(here / "b.pt2")
    assert folded.module()(*args, **(kwargs or {}))["y"].shape == (2, 4)
    assert folded.graph_signature.user_inputs == program.graph_signature.user_inputs
    assert folded.range_constraints == torch.export.load(here / "a.pt2").range_constraints
    assert bnfx.report(folded)


def test_inserted_state_comes_back_through_a_checkpoint(here: Path) -> None:
    (here / "made.py").write_text(
        "import bnfx, nets\ndef net():\n    return bnfx.insert_bn(nets.plain())\n"
    )
    assert main(["insert", "nets:plain", "a.pt", "--init", "identity"]) == 0
    state = torch.load(here / "a.pt", weights_only=True)
    torch.save({"state_dict": state, "epoch": 3}, here / "nested.pt")
    for name in ("a.pt", "nested.pt"):
        argv = ["deploy", "made:net", "a.onnx", *X, "--checkpoint", name, "--require-folded"]
        assert main(argv) == 0
    sys.modules.pop("made")


def test_calibration_reads_its_batches(here: Path) -> None:
    draw = np.random.default_rng(0)
    first, second = draw.normal(3, 2, (2, 8, 3, 16, 16)).astype(np.float32)
    np.savez(here / "0.npz", input=first)
    np.savez(here / "1.npz", image=second)
    batches = ["--calibration", "0.npz", "--calibration", "1.npz"]
    assert main(["insert", "nets:plain", "a.pt", "--init", "calibrate", *batches]) == 0
    state = torch.load(here / "a.pt", weights_only=True)
    (var,) = (value for key, value in state.items() if key.endswith("running_var"))
    assert not torch.allclose(var, torch.ones_like(var))


def test_inputs_by_name_from_npz_and_by_position(here: Path) -> None:
    np.savez(here / "x.npz", x=np.ones((2, 3, 16, 16), np.float32))
    assert main(["export", "nets:small", "a.onnx", "--input", "x.npz"]) == 0
    assert main(["export", "nets:small", "b.onnx", "--input", "image:2x3x16x16"]) == 0
    a, b = (onnx.load(str(here / name)).graph.input[0] for name in ("a.onnx", "b.onnx"))
    assert (a.name, b.name) == ("x", "image")
    assert a.type == b.type


@pytest.mark.parametrize("apart", [False, True])
def test_branches_stay_apart_where_asked(here: Path, *, apart: bool) -> None:
    how = ("--no-merge-branches",) if apart else ()
    for argv in (["export", "nets:Branches", "a.onnx", "--fold"], ["deploy", "nets:Branches"]):
        file = (["a.onnx"] if argv[0] == "deploy" else []) + [*X, *how]
        assert main([*argv, *file]) == 0
        nodes = [node.op_type for node in onnx.load("a.onnx").graph.node]
        assert nodes.count("Conv") == (2 if apart else 1), argv
    into = ["a", "b"] if apart else ["a.merged"]
    for command in ("inspect", "fold"):
        assert main([command, "nets:Branches", *X, *how, "--json", "r.json"]) == 0
        report = strict((here / "r.json").read_text())
        (norm,) = report.get("fold", report)["batch_norms"]
        assert sorted(norm["into"]) == into
    for argv in (["inspect", "a.onnx", *how], ["bench", "a.onnx", *how, "--num-runs", "50"]):
        assert main(argv) == (2 if apart else 0)


def run_cli(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bnfx", *argv]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_in_a_process_of_its_own(here: Path) -> None:
    (here / "loud.py").write_text(
        "import os\nfrom nets import small\ndef net():\n"
        "    os.write(1, b'noise from below Python\\n')\n    return small()\n"
    )
    done = run_cli("fold", "loud:net", "--json", "-", cwd=here)
    assert done.returncode == 0, done.stderr
    assert len(strict(done.stdout)["batch_norms"]) == 2
    assert "noise from below Python" in done.stderr
    assert "loading the model" not in done.stderr, "progress is for terminals"


def test_help_imports_nothing_heavy(here: Path) -> None:
    code = (
        "import sys; from bnfx.cli import main; main(['deploy', '--help']); "
        "print(*sys.modules, sep=chr(10))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=True
    )
    assert not {"torch", "onnx", "onnxruntime", "numpy", "jinja2"} & set(done.stdout.split())


def test_doctor_runs_without_torch(here: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from bnfx.cli import main; main(['doctor'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=False
    )
    assert "onnxruntime" in done.stdout, done.stderr


def drained(terminal: int) -> bytes:
    """What was written to a terminal until the last writer closed it."""
    parts = []
    with suppress(OSError):  # how Linux says that it is closed
        while part := os.read(terminal, 1 << 16):
            parts.append(part)
    return b"".join(parts)


@pytest.mark.skipif(os.name != "posix", reason="terminals as POSIX has them")
def test_progress_is_shown_on_a_terminal(here: Path) -> None:
    import pty

    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "bnfx", "deploy", "nets:small", "a.onnx", *X, "--json", "-"]
    with subprocess.Popen(command, cwd=here, stdout=subprocess.PIPE, stderr=theirs) as process:
        os.close(theirs)
        shown = drained(ours).decode()
        assert process.stdout is not None
        told = process.stdout.read().decode()
    os.close(ours)
    for name in ("loading the model", "fold", "export", "verify", "ledger"):
        assert name in shown
    assert strict(told)["exit_code"] == 0


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("after", [0.2, 0.5, 1.0, 1.6])
def test_an_early_interrupt_is_clean(here: Path, number: signal.Signals, after: float) -> None:
    """While torch is imported an interrupt comes out as anything, or not at all."""
    code = (
        "import sys\nfrom bnfx.cli import main\n"
        "print('up', flush=True)\nsys.exit(main(['fold', 'nets:slow']))"
    )

    def heed() -> None:
        signal.signal(number, signal.SIG_DFL)

    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=here,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        time.sleep(after)
        process.send_signal(number)
        _, err = process.communicate(timeout=50)
    assert process.returncode == 128 + number, err
    assert "interrupted" in err
    assert "Traceback" not in err
    assert "defect" not in err


def test_an_interrupt_that_something_swallows_is_heeded(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "deaf.py").write_text(
        "import os, signal, torch\ndef net():\n"
        "    try:\n        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    except BaseException:\n        pass\n    return torch.nn.Identity()\n"
    )
    assert main(["fold", "deaf:net"]) == 128 + signal.SIGTERM
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_is_clean(here: Path, number: signal.Signals) -> None:
    (here / "old.pt2").write_bytes(b"older")
    command = [sys.executable, "-m", "bnfx", "fold", "nets:slow", "old.pt2", *X]

    def heed() -> None:  # nohup and background jobs ignore some, and a child inherits that
        signal.signal(number, signal.SIG_DFL)

    with subprocess.Popen(
        command, cwd=here, stderr=subprocess.PIPE, text=True, preexec_fn=heed
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "started\n"
        process.send_signal(number)
        rest = process.stderr.read()
    assert process.returncode == 128 + number
    assert "interrupted" in rest
    assert "Traceback" not in rest
    assert (here / "old.pt2").read_bytes() == b"older"


#: A convolution and a BatchNormalization, as many exporters write them.
_TRAINED = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[1,1,8,8] x) => (float[1,2,8,8] y) <
  float[2,1,1,1] w = {1, 2}, float[2] s = {1, 2}, float[2] b = {3, 4}, float[2] m = {5, 6},
  float[2] v = {7, 8}
> { c = Conv (x, w) y = BatchNormalization (c, s, b, m, v) }
"""


def test_a_file_folds_into_another_or_into_itself(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = here / "trained.onnx"
    onnx.save(onnx.parser.parse_model(_TRAINED), file)
    assert main(["fold", "trained.onnx", "folded.onnx"]) == 0
    assert [n.op_type for n in onnx.load(here / "folded.onnx").graph.node] == ["Conv"]
    assert main(["fold", "trained.onnx", "folded.onnx", "--require-folded"]) == 0
    capsys.readouterr()
    assert main(["deploy", "trained.onnx", "trained.onnx", "--num-inputs", "2"]) == 0
    assert "source 1 -> bnfx 0 -> onnxruntime basic 0" in capsys.readouterr().out
    assert main(["inspect", "trained.onnx"]) == 0
    assert capsys.readouterr().out.count("BatchNorm") == 1
    assert [n.op_type for n in onnx.load(file).graph.node] == ["Conv"]
    capsys.readouterr()
    assert main(["fold", "folded.onnx"]) == 2
    assert "name the FILE" in capsys.readouterr().err
    assert main(["deploy", "folded.onnx", "other.onnx", "--opset", "18"]) == 2
    assert "leave --opset out" in capsys.readouterr().err
    assert main(["fold", "folded.onnx", "other.pt2"]) == 2
