"""`doctor`: whether this environment can fold, export, verify and run, and what to do if not.

Looking is apart from judging: `bnfx.environment.facts` collects what is there, `judge` turns it
into one line each, with the remedy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from rich.console import RenderableType

from bnfx.environment.facts import Facts, collect
from bnfx.reports.document import Headline, Status
from bnfx.reports.report import Report, table
from bnfx.runtime.packages import mismatch
from bnfx.runtime.providers import SHORT

#: bnfx itself is on no package index: what it needs is named, not its extras.
_INSTALL = "pip install onnxruntime-gpu (serves on the CPU too) or onnxruntime, never both"
_OPTIONAL = ("matplotlib", "safetensors", "timm", "torchvision")
#: What depends on torch: installed from PyPI it would bring a torch for CUDA in place of one for
#: the CPU.
_OF_TORCH = ("torch", "torchvision", "timm")
_CPU_INDEX = "--extra-index-url https://download.pytorch.org/whl/cpu"


@dataclass(frozen=True)
class EnvCheck:
    """One line of the report."""

    #: What was looked at.
    name: str
    #: "ok"; "warning": bnfx works, something else may not; "error": bnfx cannot work.
    status: Literal["ok", "warning", "error"]
    #: What was found.
    detail: str
    #: What to do; "" where nothing needs doing.
    remedy: str = ""


@dataclass(frozen=True)
class EnvReport(Report):
    """The environment, line by line; true where it is usable."""

    #: "error" if any line is; else "warning" if any is; else "ok".
    status: Literal["ok", "warning", "error"]
    #: "cpu", "cuda" and the others of this onnxruntime -> why no node runs there; "" where one ran.
    providers: Mapping[str, str]
    checks: tuple[EnvCheck, ...]

    def headline(self) -> Headline:
        """Whether it is usable."""
        verdicts: dict[str, tuple[Status, str]] = {
            "ok": ("good", "This environment can do all of it."),
            "warning": ("warning", "This environment works; something in it needs a look."),
            "error": ("bad", "This environment does not work yet."),
        }
        return Headline("bnfx: doctor", *verdicts[self.status])

    def __bool__(self) -> bool:
        return self.status != "error"

    def why_not(self, provider: str) -> str:
        """Why onnxruntime runs no node on a provider; "" where it does."""
        wheels = SHORT[provider].wheels if provider in SHORT else "a wheel or a plugin that has it"
        lacking = f"not built into this onnxruntime; it comes with {wheels}"
        return self.providers.get(provider, lacking)

    def __rich__(self) -> RenderableType:
        rows = [(c.name, c.status, c.detail, c.remedy or "-") for c in self.checks]
        title = f"doctor: {self.status}"
        return table(title, ("", "status", "found", "what to do"), rows)


def doctor() -> EnvReport:
    """Look at Python, the packages, onnxruntime's providers, CUDA's libraries and the driver.

    Providers are started in a process of their own, so that one that crashes cannot take this one
    with it. Works where onnxruntime is missing or broken.
    """
    return judge(collect())


def judge(facts: Facts) -> EnvReport:
    """The report on what was found."""
    checks = tuple(_checks(facts))
    found = {check.status for check in checks}
    status: Literal["ok", "warning", "error"] = (
        "error" if "error" in found else "warning" if "warning" in found else "ok"
    )
    return EnvReport(status, dict(facts.providers), checks)


def _checks(facts: Facts) -> Iterator[EnvCheck]:
    yield EnvCheck("bnfx", "ok", facts.bnfx)
    yield _python(facts)
    for name in ("torch", "numpy", "onnx", "onnxscript"):
        yield _package(facts, name)
    yield from _runtime(facts)
    yield _provider_cpu(facts)
    yield from _cuda(facts)
    yield from _other_providers(facts)
    for name in _OPTIONAL:
        version = facts.versions.get(name)
        remedy = "" if version else f"optional; {_wanted(facts, name)}"
        yield EnvCheck(name, "ok", version or "not installed", remedy)


def _wanted(facts: Facts, name: str, least: str = "") -> str:
    """The command that installs a package and leaves a torch for the CPU one for the CPU."""
    package = f"'{name}>={least}'" if least else name
    keeps_cpu = name in _OF_TORCH and facts.versions.get("torch") and not facts.torch_cuda
    if keeps_cpu and name == "torch":
        return f"pip install {package} --index-url https://download.pytorch.org/whl/cpu"
    return f"pip install {package} {_CPU_INDEX}" if keeps_cpu else f"pip install {package}"


def _python(facts: Facts) -> EnvCheck:
    found = ".".join(map(str, facts.python))
    if facts.python >= (3, 11):
        return EnvCheck("Python", "ok", found)
    return EnvCheck("Python", "error", found, "use Python 3.11 or later")


def _package(facts: Facts, name: str) -> EnvCheck:
    version, least = facts.versions[name], facts.least.get(name, "")
    wanted = _wanted(facts, name, least)
    if version is None:
        return EnvCheck(name, "error", "not installed", wanted)
    if broken := facts.import_errors.get(name):
        return EnvCheck(name, "error", f"{version}, and its import fails: {broken}", wanted)
    built = f", built for {_cuda_text(facts.torch_cuda)}" if name == "torch" else ""
    if least and numbers(version) < numbers(least):
        return EnvCheck(name, "error", f"{version}{built}; {least} or later is needed", wanted)
    return EnvCheck(name, "ok", f"{version}{built}")


def _cuda_text(version: str | None) -> str:
    return f"CUDA {version}" if version else "the CPU"


def _runtime(facts: Facts) -> Iterator[EnvCheck]:
    found = " and ".join(f"{name} {version}" for name, version in facts.runtimes.items())
    again = f"pip uninstall -y {' '.join(facts.runtimes)}, then {_INSTALL}"
    owner = facts.runtime_owner or "an unknown one"
    if not facts.runtimes:
        yield EnvCheck("onnxruntime", "error", "not installed", _INSTALL)
    elif len(facts.runtimes) > 1:
        detail = f"{found}: they own the same files, and those there now are of {owner}"
        yield EnvCheck("onnxruntime", "error", detail, again)
    elif broken := facts.import_errors.get("onnxruntime"):
        yield EnvCheck("onnxruntime", "error", f"{found}, and its import fails: {broken}", again)
    elif facts.runtime_owner and facts.runtime_owner not in facts.runtimes:
        detail = f"{found}, but the files there are of {owner}"
        yield EnvCheck("onnxruntime", "error", detail, again)
    else:
        yield _runtime_version(facts, *facts.runtimes.items())
    for name, folder in facts.shadowed.items():
        detail = f"{name} lies in {folder} and is not the one in use"
        yield EnvCheck("another onnxruntime", "ok", detail)


def _runtime_version(facts: Facts, wheel: tuple[str, str]) -> EnvCheck:
    name, version = wheel
    found, least = f"{name} {version}, built for {_cuda_text(facts.runtime_cuda)}", facts.least
    if name in least and numbers(version) < numbers(least[name]):
        remedy = f"pip install '{name}>={least[name]}'"
        return EnvCheck("onnxruntime", "error", f"{found}; {least[name]} is needed", remedy)
    return EnvCheck("onnxruntime", "ok", found)


def _provider_cpu(facts: Facts) -> EnvCheck:
    reason = facts.providers["cpu"]
    if not reason:
        return EnvCheck("provider cpu", "ok", "ran a node")
    return EnvCheck("provider cpu", "error", reason, "mend onnxruntime, as said above")


def _cuda(facts: Facts) -> Iterator[EnvCheck]:
    """Whether CUDA runs; and only for an onnxruntime that is built for it, what it lacks."""
    reason = facts.providers["cuda"]
    if not reason:
        yield EnvCheck("provider cuda", "ok", "ran a node, and none fell back to the CPU")
    elif not facts.runtime_cuda:
        other = f"pip uninstall -y {' '.join(facts.runtimes)}, then pip install onnxruntime-gpu"
        remedy = f"for NVIDIA GPUs: {other}"
        yield EnvCheck("provider cuda", "ok", "not built into this onnxruntime", remedy)
        return
    else:
        remedy = "see the lines on CUDA below; on the CPU bnfx works without"
        yield EnvCheck("provider cuda", "warning", reason, remedy)
    assert facts.runtime_cuda is not None
    yield _majors(facts, facts.runtime_cuda)
    for name, found, lacking, remedy in _parts(facts, facts.runtime_cuda):
        if not lacking:
            yield EnvCheck(name, "ok", found)
        else:  # which is no matter where CUDA runs all the same
            yield EnvCheck(name, "warning" if reason else "ok", lacking, remedy)


def _other_providers(facts: Facts) -> Iterator[EnvCheck]:
    """One line for each; bnfx works without them."""
    for name in (name for name in facts.providers if name not in ("cpu", "cuda")):
        reason = facts.providers[name]
        found = f"runs no node here: {reason}" if reason else "ran a node, and none fell back"
        yield EnvCheck(f"provider {name}", "ok", found)


def _parts(facts: Facts, cuda: str) -> Iterator[tuple[str, str, str, str]]:
    """Name, what was found, what is lacking and what brings it, of each part that CUDA needs."""
    missing = [n for n in facts.missing_libraries or () if not n.startswith("libcuda.so")]
    known = "all found" if facts.missing_libraries is not None else "not looked at: no ldd here"
    packages = " ".join(sorted({package_of(name, cuda) for name in missing}))
    lacking = f"missing: {', '.join(missing)}" if missing else ""
    yield "CUDA libraries", known, lacking, f"pip install {packages}"
    if facts.driver is None:
        lacking, remedy = "libcuda.so.1 does not load", "install NVIDIA's driver; in a container, "
        yield "driver", "", lacking, f"{remedy}run it with --gpus all"
    else:
        found = f"{facts.driver}; {', '.join(facts.devices) or 'no device'}"
        yield "driver", found, "" if facts.devices else found, "attach a GPU"
    lacking = "" if facts.cudnn else "libcudnn.so.9 does not load"
    yield "cuDNN", facts.cudnn or "", lacking, f"pip install {package_of('libcudnn.so.9', cuda)}"


def _majors(facts: Facts, cuda: str) -> EnvCheck:
    wanted = cuda.partition(".")[0]
    if facts.torch_cuda is None:
        detail = f"torch is built for the CPU, onnxruntime for CUDA {cuda}"
        remedy = (
            f"nothing on a machine without a GPU; with one, a torch built for CUDA {wanted} brings "
            "the libraries"
        )
        return EnvCheck("CUDA versions", "ok", detail, remedy)
    detail = f"torch {facts.torch_cuda}, onnxruntime {cuda}"
    if mismatch(cuda, facts.torch_cuda) is None:
        return EnvCheck("CUDA versions", "ok", detail)
    remedy = (
        f"install a torch built for CUDA {wanted}, or an onnxruntime-gpu for CUDA "
        f"{facts.torch_cuda.partition('.')[0]} (1.23 to 1.26 are CUDA 12, 1.28 and later CUDA 13)"
    )
    return EnvCheck("CUDA versions", "warning", f"{detail}: majors differ", remedy)


def package_of(library: str, cuda: str) -> str:
    """The package on PyPI that brings a CUDA library, such as "libcublas.so.13" for CUDA "13.0"."""
    major = cuda.partition(".")[0]
    stem = library.partition(".")[0].removeprefix("lib")
    if stem.startswith("cudnn"):
        return f"nvidia-cudnn-cu{major}"
    names = {"cublas": "cublas", "cublasLt": "cublas", "cudart": "cuda-runtime"}
    names |= {"nvrtc": "cuda-nvrtc", "nvJitLink": "nvjitlink"}
    suffix = "" if int(major) >= 13 else f"-cu{major}"  # from CUDA 13 on names have no suffix
    return f"nvidia-{names.get(stem, stem.lower())}{suffix}"


def numbers(version: str) -> tuple[int, ...]:
    """`"2.13.0+cpu"` -> `(2, 13, 0)`."""
    parts = version.partition("+")[0].split(".")
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in parts)
