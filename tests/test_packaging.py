"""The wheel and the source archive hold the tree; importing bnfx is light and has one `passes`."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import bnfx

ROOT = Path(__file__).parent.parent
PAGE = "bnfx/reports/report.html.jinja"
HEAVY = ("matplotlib", "onnx", "onnxruntime", "onnxscript", "rich", "sympy")

# One worker builds; the others would only build the same again.
pytestmark = pytest.mark.xdist_group("packaging")


def python(code: str, cwd: Path) -> str:
    """Standard output of `code` in a fresh interpreter that starts in `cwd`."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source archive, and the wheel built from that archive."""
    tree = tmp_path_factory.mktemp("tree of bnfx")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("bnfx", "passes", "tests", "examples"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tree / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", "out", "."]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return tree / "out"


def modules_of_the_tree() -> set[str]:
    core = {str(path.relative_to(ROOT)) for path in (ROOT / "bnfx").rglob("*.py")}
    passes = {f"bnfx/passes/{path.name}" for path in (ROOT / "passes").glob("*.py")}
    return core | passes


def test_every_room_is_a_package_of_the_wheel() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    told = set(project["tool"]["setuptools"]["packages"])
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "bnfx").rglob("*.py")}
    rooms = {".".join(folder.parts) for folder in folders}
    assert told == rooms | {"bnfx.passes"}, "another folder would miss the wheel"
    assert {path.parent for path in (ROOT / "passes").rglob("*.py")} == {ROOT / "passes"}


def test_wheel_holds_the_tree(archives: Path) -> None:
    (wheel,) = archives.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert files == modules_of_the_tree() | {"bnfx/py.typed", PAGE}


def test_source_archive_holds_what_the_build_and_the_tests_need(archives: Path) -> None:
    (sdist,) = archives.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    tree = {
        str(p.relative_to(ROOT))
        for d in ("bnfx", "passes", "tests", "examples")
        for p in (ROOT / d).rglob("*.py*")
        if p.suffix in {".py", ".pyi"}
    }
    assert tree | {"pyproject.toml", "LICENSE", "README.md", "bnfx/py.typed"} <= files


@pytest.fixture(scope="module")
def installed(archives: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel and nothing else."""
    (wheel,) = archives.glob("*.whl")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    target = tmp_path_factory.mktemp("installed") / "site"
    subprocess.run([*command, "--target", str(target), str(wheel)], check=True)
    return target


def test_archives_are_what_an_index_takes(archives: Path) -> None:
    pytest.importorskip("twine", reason="twine is not installed: pip install bnfx[test]")
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, archives.iterdir())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2


@pytest.mark.slow
def test_demo_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    demo = str(ROOT / "examples" / "digits.py")
    code = f"""
import runpy, sys
sys.path.insert(0, {str(installed)!r})
import bnfx
assert bnfx.__file__.startswith({str(installed)!r}), bnfx.__file__
sys.argv = [{demo!r}, "--quick", "--out", "demo"]
sys.path.insert(1, {str(Path(demo).parent)!r})
runpy.run_path({demo!r}, run_name="__main__")
"""
    python(code, tmp_path)
    page = (tmp_path / "demo" / "index.html").read_text(encoding="utf-8")
    assert page.count("Passed") >= 1
    assert "training.png" not in page, "the page is one file"


def test_installed_wheel_imports(installed: Path, tmp_path: Path) -> None:
    target = installed
    code = f"""
import sys
sys.path.insert(0, {str(target)!r})
import bnfx, bnfx.passes
print(bnfx.__file__); print(bnfx.passes.__file__); print(bnfx.passes.__name__)
try:
    import passes
except ModuleNotFoundError:
    print("no passes")
"""
    assert python(code, tmp_path).splitlines() == [
        str(target / "bnfx" / "__init__.py"),
        str(target / "bnfx" / "passes" / "__init__.py"),
        "bnfx.passes",
        "no passes",
    ]


def test_passes_has_one_name_in_a_checkout_too() -> None:
    code = """
import bnfx
assert bnfx.passes.__name__ == "bnfx.passes"
try:
    import passes
except ImportError as refusal:
    print(refusal)
"""
    assert "this package is bnfx.passes" in python(code, ROOT)


def test_import_is_light(tmp_path: Path) -> None:
    code = "import sys, bnfx; print(*{name.partition('.')[0] for name in sys.modules})"
    assert not set(HEAVY) & set(python(code, tmp_path).split())


def test_every_name_resolves_without_onnxruntime(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["onnxruntime"] = None
import bnfx
print(*(name for name in bnfx.__all__ if getattr(bnfx, name) is None))
"""
    assert python(code, tmp_path) == ""


def test_type_checkers_see_the_names_that_load_lazily() -> None:
    tree = ast.parse((ROOT / "bnfx" / "__init__.py").read_text())
    guard = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in guard.body if isinstance(node, ast.ImportFrom)]
    typed = {alias.name: node.module for node in imports for alias in node.names}
    assert typed.pop("passes") == "bnfx"
    assert typed == bnfx._HOME
    assert sorted({*typed, "passes"}) == sorted(bnfx.__all__)


def test_unknown_name_is_an_attribute_error() -> None:
    name = "fold_batchnorm"
    with pytest.raises(AttributeError, match=rf"{name}.*did you mean fold_bn\?"):
        getattr(bnfx, name)
    with pytest.raises(AttributeError, match=r"has no attribute 'xyzzy'$"):
        getattr(bnfx, "xyzzy")  # noqa: B009  # type checkers know that it is not there


def test_dir_shows_what_is_public_alone() -> None:
    assert dir(bnfx) == sorted(bnfx.__all__)


def test_version_has_one_place(archives: Path) -> None:
    assert {path.name.split("-")[1].removesuffix(".tar.gz") for path in archives.iterdir()} == {
        bnfx.__version__
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project
    assert f"\nversion: {bnfx.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_pre_commit_and_make_use_one_ruff() -> None:
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    (pinned,) = (line.removeprefix("ruff==") for line in pins if line.startswith("ruff=="))
    assert f"rev: v{pinned}\n" in (ROOT / ".pre-commit-config.yaml").read_text()
