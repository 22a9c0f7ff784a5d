"""The core tests on sets of versions, each in an environment of its own under .venv-versions/.

`make test-versions` runs all sets, `make test-versions SETS="oldest newest"` some. A set whose
Python is not on this machine is told and not run. What was seen goes to examples/site/versions.json
from which the page on versions is made. Environments are kept; delete the folder to start anew.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".venv-versions"
SEEN = ROOT / "examples" / "site" / "versions.json"
CORE = (
    "tests/passes/test_fold_bn.py",
    "tests/passes/test_golden_fold_bn.py",
    "tests/passes/test_golden_insert_bn.py",
    "tests/passes/test_insert_bn.py",
    "tests/operators/test_table.py",
    "tests/statistics/test_recalibration.py",
    "tests/test_export.py",
    "tests/test_file_folding.py",
    "tests/test_deploy.py",
)
LEAST = ("jinja2==3.1.0", "numpy==1.26.0", "rich==13.7.0")
TOOLS = ("pytest", "hypothesis", "safetensors", "setuptools")
TELL = ("torch", "onnx", "onnxscript", "onnxruntime", "numpy")


@dataclass(frozen=True)
class Set:
    """Versions that are tried together."""

    name: str
    python: str
    packages: tuple[str, ...]


def _runtime(onnx: str, onnxscript: str, onnxruntime: str) -> tuple[str, ...]:
    return (f"onnx=={onnx}", f"onnxscript=={onnxscript}", f"onnxruntime=={onnxruntime}")


SETS = (
    Set("oldest", "3.11", ("torch==2.11.0", *_runtime("1.19.0", "0.6.0", "1.23.0"), *LEAST)),
    Set("old-files", "3.11", ("torch==2.13.0", *_runtime("1.19.0", "0.6.0", "1.23.0"), *LEAST)),
    Set("new-files", "3.12", ("torch==2.13.0", *_runtime("1.23.2", "0.7.2", "1.32.0"))),
    Set("newest", "3.13", ("torch==2.14.1", *_runtime("1.23.2", "0.7.2", "1.32.0"))),
    Set("latest", "3.14", ("torch", "onnx", "onnxscript", "onnxruntime")),
)


def interpreter(version: str) -> str | None:
    """The Python of this version, wherever this machine has one."""
    homes = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for found in (shutil.which(f"python{version}"), *map(str, homes)):
        asked = found and subprocess.run(
            [found, "-c", "import sys; print(*sys.version_info[:2], sep='.')"],
            capture_output=True,
            text=True,
            check=False,
        )
        if asked and asked.stdout.strip() == version:
            return found
    return None


def installed(wanted: Set, python: str) -> Path:
    """The interpreter of the set's environment."""
    home = FOLDER / wanted.name
    own, mark = home / "bin" / "python", home / "packages.txt"
    told = "\n".join((*wanted.packages, *TOOLS))
    if not mark.is_file() or mark.read_text() != told:
        subprocess.run([python, "-m", "venv", "--clear", str(home)], check=True)
        pip = [str(own), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, *wanted.packages, *TOOLS, "-e", str(ROOT)], check=True)
        mark.write_text(told)
    return own


def run(wanted: Set) -> dict[str, object]:
    """Install a set and run the core tests on it; what was seen."""
    python = interpreter(wanted.python)
    if python is None:
        return {"result": f"not run: no Python {wanted.python} here"}
    own = installed(wanted, python)
    code = f"import json, importlib.metadata as m\nfound = {{n: m.version(n) for n in {TELL}}}\n"
    code += "print(json.dumps(found))"
    versions = json.loads(subprocess.check_output([own, "-c", code], text=True))
    began = time.monotonic()
    done = subprocess.run(
        [own, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", *CORE],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    sys.stdout.write(done.stdout[-6000:])
    counts = re.findall(r"(\d+) (passed|failed|errors?|skipped)", done.stdout[-200:])
    return {
        "result": "passed" if done.returncode == 0 else "failed",
        **{word: int(number) for number, word in counts},
        "seconds": round(time.monotonic() - began),
        "day": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": subprocess.check_output([own, "-V"], text=True).split()[1],
        **versions,
    }


def main(names: list[str]) -> int:
    """Run the sets; 0 where at least three were run, or all that were named, and passed."""
    chosen = [one for one in SETS if not names or one.name in names]
    seen = json.loads(SEEN.read_text()) if SEEN.is_file() else {}
    results = []
    for one in chosen:
        sys.stdout.write(f"== {one.name}: Python {one.python}, {', '.join(one.packages)}\n")
        found = run(one)
        results.append(found["result"])
        if not str(found["result"]).startswith("not run"):
            seen[one.name] = found
        sys.stdout.write(f"== {one.name}: {found}\n")
        SEEN.write_text(json.dumps(seen, indent=1) + "\n")
    enough = results.count("passed") >= (len(names) or 3)
    return 0 if enough and "failed" not in results else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
