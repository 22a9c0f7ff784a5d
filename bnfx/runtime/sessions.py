"""Sessions of onnxruntime that run where they were asked to, or not at all.

onnxruntime falls back to the CPU silently: it lists CUDA where CUDA cannot load, and a session that
asked for it succeeds; its Python class does so once more, when a session is made and in any run. So
a session is opened with its provider alone and with every fallback forbidden, and afterwards
onnxruntime is asked which provider holds each node (`bnfx.runtime.assignment`).
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnfx.errors import ProviderError, VerificationError
from bnfx.runtime.packages import cuda_mismatch, without_telemetry
from bnfx.runtime.providers import CUDA, LIBRARY, SHORT, Where, installed_plugins, plugin_path

_REMEDIES = {
    CUDA: "install onnxruntime-gpu on a machine with an NVIDIA GPU and driver, with CUDA libraries "
    "of its own major version (torch brings them), "
}
#: Where in onnxruntime's own code it was, which tells a user nothing.
_SOURCE = re.compile(
    r"/onnxruntime_src/\S+:\d+ [^()]*\([^()]*\)(?: const)? |\[ONNXRuntimeError\] : \d+ : "
)
_WHEELS = {provider.name: provider.wheels for provider in SHORT.values()}


def load_onnxruntime(*, cuda: bool = False) -> Any:
    """The module `onnxruntime`.

    Args:
        cuda: Whether the CUDA libraries that onnxruntime-gpu needs are to be loaded before.

    Raises:
        ProviderError: It is not installed.
    """
    without_telemetry()
    if importlib.util.find_spec("onnxruntime") is None:
        raise ProviderError(
            "onnxruntime is not installed; install onnxruntime-gpu (NVIDIA GPUs, serves on the CPU "
            "too) or onnxruntime, never both"
        )
    if cuda:
        importlib.import_module("torch")  # its import loads them
    return importlib.import_module("onnxruntime")


def runtime_errors() -> tuple[type[Exception], ...]:
    """What onnxruntime raises: its exceptions have no common base but Exception."""
    load_onnxruntime()
    state = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    names = (
        *("EPFail", "EngineError", "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf"),
        *("ModelLoaded", "NoModel", "NoSuchFile", "NotImplemented", "RuntimeException"),
    )
    # A provider that does not start raises plain ones.
    return (MemoryError, RuntimeError, ValueError, *(getattr(state, name) for name in names))


def faults() -> tuple[type[Exception], ...]:
    """What opening and running a session raises here."""
    return (ProviderError, VerificationError, *runtime_errors())


@dataclass(frozen=True)
class SessionSettings:
    """How a session is opened."""

    #: Of one operator on the CPU; 0 lets onnxruntime choose.
    num_threads: int = 0
    #: Whether the provider must take every node, so that nothing runs on the CPU.
    strict: bool = True
    #: Whether CUDA may round factors to TF32.
    tf32: bool = False
    #: Names of onnxruntime's optimisers to leave out, separated by semicolons.
    without: str = ""
    #: Whether onnxruntime optimises the graph; without, every value of it is computed.
    optimise: bool = True
    #: Prefix of the profile's file; "" takes none.
    profile: str = ""
    #: Folder of the external data of a model given as bytes; "" where it has none.
    weights: str = ""
    #: Whether threads without work wait busily: a little faster, for twice the processor time.
    spin: bool = False


def open_session(
    model: str | Path | bytes,
    provider: str | Where = "cpu",
    settings: SessionSettings | None = None,
) -> Any:
    """An `onnxruntime.InferenceSession` on one provider.

    Args:
        model: Path of an ONNX file, or its bytes.
        provider: Where to run; a name alone is one without options.
        settings: How to open it.

    Raises:
        ProviderError: The provider cannot run the graph; the message holds the cause.
        VerificationError: onnxruntime cannot read or run the model.
    """
    how = settings or SessionSettings()
    where = Where.of(provider) if isinstance(provider, str) else provider
    name, entries = where.entries(tf32=how.tf32)
    ort = load_onnxruntime(cuda=where.on_nvidia)
    what = "the model" if isinstance(model, bytes) else str(model)
    source = model if isinstance(model, bytes) else str(model)
    _require_available(ort, where, what)
    options = _options(ort, how, strict=how.strict and not where.on_cpu)
    try:
        with _quiet(ort):
            # Without its own fallback, which hides the cause and prints to standard output.
            session = ort.InferenceSession(
                source, options, providers=[(name, entries)], enable_fallback=0
            )
    except runtime_errors() as error:
        if where.on_cpu:
            raise VerificationError(f"onnxruntime cannot open {what}: {_advised(error)}") from error
        raise ProviderError(f"{name} did not run {what}: {_cause(name, error)}") from error
    require_still_on(session, name, what)
    return session


def _advised(error: Exception) -> str:
    if "NOT_IMPLEMENTED" not in str(error):
        return str(error)
    return (
        f"{error}. It has no kernel for this operator in this dtype there; export in float32 "
        "(model.float()), or with another opset_version"
    )


def _cause(name: str, error: Exception) -> str:
    """What onnxruntime says, or why the provider's library does not load, and what to do."""
    problem = cuda_problem() if name == CUDA else None
    said = _SOURCE.sub("", str(error)).strip().rstrip(".; ")
    remedy = _REMEDIES.get(name, "") if problem or "CUDA failure" in said else ""
    return f"{problem or said}; {remedy}or use provider='cpu'"


def require_still_on(session: Any, name: str, what: str) -> None:
    """Refuse a session that does not have, or has left, the provider that it was opened on.

    Raises:
        ProviderError: It is so.
    """
    there = session.get_providers()
    if there[:1] != [name]:
        cause = (cuda_problem() if name == CUDA else None) or f"the session has {there}"
        raise ProviderError(
            f"onnxruntime did not start {name} for {what}, or switched from it: {cause}; "
            f"{_REMEDIES.get(name, '')}or use provider='cpu'"
        )


def _require_available(ort: Any, where: Where, what: str) -> None:
    """Refuse a provider that this onnxruntime has not; a plugin's library is loaded here.

    Raises:
        ProviderError: It has it neither built in nor as a plugin.
    """
    name = where.name
    library = where.options.get(LIBRARY, "")
    if not library and name not in ort.get_available_providers():
        module = installed_plugins().get(name)
        library = importlib.import_module(module).get_library_path() if module else ""
    if library:
        _register(ort, name, library)
    if name in ort.get_available_providers():
        return
    if library:
        raise ProviderError(
            f"{name} was asked for to run {what}: its library {library} loads and offers no device "
            "on this machine; use provider='cpu'"
        )
    remedy = _REMEDIES.get(name, f"it comes with {_WHEELS.get(name, 'a wheel or a plugin')}, ")
    raise ProviderError(
        f"{name} did not run {what}: this onnxruntime {ort.__version__} was built without it, and "
        f"has {', '.join(ort.get_available_providers())}; {remedy}or use provider='cpu'"
    )


def _register(ort: Any, name: str, library: str) -> None:
    """Load the library of a plugin, once."""
    if plugin_path(name):
        return
    try:
        with _quiet(ort):
            ort.register_execution_provider_library(name, os.fspath(library))
    except AttributeError as error:
        raise ProviderError(
            f"onnxruntime {ort.__version__} loads no plugins; use 1.23 or later for {name}"
        ) from error
    except runtime_errors() as error:
        raise ProviderError(f"the library of {name} does not load: {error}") from error


def _options(ort: Any, how: SessionSettings, *, strict: bool) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = how.num_threads
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if how.without:
        options.add_session_config_entry("optimization.disable_specified_optimizers", how.without)
    if strict:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    if not how.optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if not how.spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if how.profile:
        options.enable_profiling = True
        options.profile_file_prefix = how.profile
    if how.weights:
        key = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(key, how.weights)
    return options


@contextmanager
def _quiet(ort: Any) -> Iterator[None]:
    """Without onnxruntime's own lines on stderr: what matters of them is in the error raised."""
    ort.set_default_logger_severity(4)
    try:
        yield
    finally:
        ort.set_default_logger_severity(2)  # onnxruntime's default; it has no getter


def cuda_problem() -> str | None:
    """Why onnxruntime's CUDA provider cannot be loaded; None if it can."""
    ort = load_onnxruntime(cuda=True)
    if CUDA not in ort.get_available_providers():
        return "this onnxruntime was built without CUDA (it is the CPU package)"
    library = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_shared.so"
    try:
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(library.with_name("libonnxruntime_providers_cuda.so")))
    except OSError as error:
        mismatch = cuda_mismatch()
        return f"{error} ({mismatch})" if mismatch else str(error)
    return None
