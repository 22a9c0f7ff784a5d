"""CUDA's libraries without a card: onnxruntime's real CUDA provider loads them.

What the provider links to is read from its own library, so that a newer one gets what it asks for.
There is no cuDNN among them: the provider loads that by itself, at the first convolution.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path

import pytest

from bnfx.runtime.packages import folder_of

_SOURCE = Path(__file__).with_name("cuda_stub.c")
_HEADERS = ("/usr/local/cuda/include", "/usr/local/cuda-*/include", "/usr/include")


def stub_environment(folder: Path) -> dict[str, str]:
    """Variables under which a process finds the stub's libraries, which are written to `folder`.

    The test is skipped where one of the wheel, a compiler, binutils and CUDA's headers is missing.
    """
    build(folder, _provider(), _headers())
    paths = (str(folder), os.environ.get("LD_LIBRARY_PATH", ""))
    return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(filter(None, paths))}


def _provider() -> Path:
    library = (folder_of("onnxruntime") or Path()) / "capi" / "libonnxruntime_providers_cuda.so"
    if not library.is_file():
        pytest.skip("the stub of CUDA needs the wheel onnxruntime-gpu for Linux")
    for tool in ("cc", "nm", "readelf"):
        if shutil.which(tool) is None:
            pytest.skip(f"the stub of CUDA needs {tool}")
    return library


def _headers() -> Path:
    own = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [Path(home) / "include" for home in own if home]
    places += [folder for pattern in _HEADERS for folder in Path("/").glob(pattern[1:])]
    for folder in places:
        if (folder / "driver_types.h").is_file():
            return folder
    pytest.skip("the stub of CUDA needs CUDA's headers (driver_types.h)")


def build(folder: Path, provider: Path, headers: Path) -> None:
    """Write every CUDA library that `provider` needs, with each symbol in the version it asks."""
    told = subprocess.run(
        ["readelf", "-d", str(provider)], capture_output=True, text=True, check=True
    ).stdout
    needed = re.findall(r"NEEDED.*\[(lib(?:cu|nv)\S+)\]", told)
    symbols = defaultdict[str, list[str]](list)
    asked = subprocess.run(
        ["nm", "-D", "-u", str(provider)], capture_output=True, text=True, check=True
    ).stdout
    for name, library in re.findall(r"\bU ((?:__cuda|cu|nv)\w+)(?:@+(\S+))?", asked):
        symbols[library or "libcuda.so.1"].append(name)
    written = _SOURCE.read_text(encoding="utf-8")
    ours = set(re.findall(r"^[\w ]+?\**(\w+)\([^;]*\{", written, re.MULTILINE))
    with tempfile.TemporaryDirectory() as place:
        for library in needed:
            names = symbols[library]
            rest = (f"int {name}(void) {{ return 0; }}\n" for name in names if name not in ours)
            source = Path(place, "stub.c")
            source.write_text(f"{written}\n{''.join(rest)}", encoding="utf-8")
            _compile(source, folder / library, library, headers, versioned=library in asked)


def _compile(source: Path, target: Path, name: str, headers: Path, *, versioned: bool) -> None:
    script = source.with_suffix(".map")
    script.write_text(f"{name} {{ global: *; }};\n" if versioned else "{ global: *; };\n")
    flags = ["-shared", "-fPIC", "-w", "-fno-builtin", f"-I{headers}", f"-Wl,-soname,{name}"]
    command = ["cc", *flags, f"-Wl,--version-script={script}", "-o", str(target), str(source)]
    subprocess.run(command, check=True)
