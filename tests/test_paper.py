"""The scripts of the paper's claims run, and what they write can be read, drawn and believed."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from tests.test_examples import run_script

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "paper"))
import claims
import image_data
import page
import run_all
import without_dropout

PAPER = Path(run_all.__file__).parent
RESULTS = PAPER / "results"

pytestmark = pytest.mark.xdist_group("examples")


@pytest.mark.slow
def test_every_claim_in_its_quick_form(tmp_path: Path) -> None:
    out = tmp_path / "quick results"
    text = run_script(PAPER / "run_all.py", "--quick", "--out", out, cwd=tmp_path)
    for study, _ in run_all.STUDIES:
        results = json.loads((out / f"{study.name}.json").read_text())
        assert results["quick"]
        assert results["run"]["torch"] == torch.__version__
        assert all(row["ours"] and row["verdict"] for row in results["verdict"])
        assert (out / f"{study.name}.png").read_bytes().startswith(b"\x89PNG")
        assert study.name in text
    verdicts = {f.stem: json.loads(f.read_text())["verdict"] for f in out.glob("*.json")}
    for name in ("figure1a", "depth", "initial_scales", "learning_rates", "identities"):
        assert verdicts[name][0]["verdict"].startswith("holds"), verdicts[name]


def test_stored_results_are_complete_and_small() -> None:
    pictures = list(RESULTS.glob("*.png"))
    assert {f.stem for f in pictures} == {f.stem for f in RESULTS.glob("*.json")}
    assert {study.name for study, _ in run_all.STUDIES} <= {f.stem for f in pictures}
    sizes = [f.stat().st_size for f in pictures]
    assert max(sizes) < 60_000
    assert sum(sizes) < 600_000


def test_stored_verdicts_follow_from_the_stored_numbers() -> None:
    for study, more in run_all.STUDIES:
        for name in (study.name, *(f"{study.name}_{data}" for data in more)):
            f = RESULTS / f"{name}.json"
            if not f.exists():
                continue
            results = json.loads(f.read_text())
            assert not results["quick"]
            rows = [asdict(row) for row in study.judge(results)]
            assert rows == results["verdict"], name


def test_the_page_is_what_the_results_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = page.PAGE.read_text()
    copy = tmp_path / "README.md"
    copy.write_text(before)
    monkeypatch.setattr(page, "PAGE", copy)
    page.write(RESULTS)
    assert copy.read_text() == before, "run examples/paper/run_all.py --redraw"


def fake_mnist(folder: Path) -> None:
    """Files of the right names with other contents."""
    folder.mkdir(parents=True)
    for name in image_data.IDX_FILES:
        (folder / name).write_bytes(b"\0\0\x08\x01" + struct.pack(">i", 2) + b"\1\2")


def test_images_with_another_md5_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_mnist(tmp_path / "MNIST" / "raw")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(image_data.DataUnavailableError, match="npm is not installed"):
        image_data.load_images("mnist", tmp_path)
    source = image_data.SOURCES["mnist"]
    with pytest.raises(image_data.DataUnavailableError, match="not the published file"):
        image_data._take(source, tmp_path / "MNIST" / "raw", tmp_path / "new")
    assert not list((tmp_path / "new").glob("*"))


def test_missing_images_are_a_message_and_an_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    where = ["--cache", str(tmp_path), "--out", str(tmp_path / "out")]
    assert claims.main(without_dropout.STUDY, where) == 3
    assert "--data digits" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_idx_files_are_read(tmp_path: Path) -> None:
    f = tmp_path / "idx"
    f.write_bytes(b"\0\0\x08\x02" + struct.pack(">ii", 2, 3) + bytes(range(6)))
    assert image_data._read_idx(f).tolist() == [[0, 1, 2], [3, 4, 5]]
    f.write_bytes(gzip.compress(b"something else"))
    with pytest.raises(image_data.DataUnavailableError, match="not an IDX file"):
        image_data._read_idx(f)


def test_a_study_draws_again_from_stored_numbers(tmp_path: Path) -> None:
    shutil.copy(RESULTS / "depth.json", tmp_path)
    run_script(PAPER / "depth.py", "--redraw", "--out", tmp_path, cwd=tmp_path)
    assert (tmp_path / "depth.png").exists()
