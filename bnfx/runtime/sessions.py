"""Sessions of onnxruntime that run where they were asked to, or not at all.

onnxruntime falls back to the CPU silently: it lists CUDA where CUDA cannot load, and a session that
asked for it succeeds. So a CUDA session is opened with CUDA alone and with the fallback forbidden,
and afterwards onnxruntime is asked which provider holds each node.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bnfx.errors import ProviderError, VerificationError
from bnfx.runtime.packages import cuda_mismatch, without_telemetry

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_REMEDY = (
    "install onnxruntime-gpu on a machine with an NVIDIA GPU and driver, with CUDA libraries of "
    "its own major version (torch brings them), or use provider='cpu'"
)


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
    return (MemoryError, *(getattr(state, name) for name in names))


def execution_provider(provider: str, *, tf32: bool = False) -> tuple[str, dict[str, str]]:
    """Name and options in onnxruntime's terms of "cpu", "cuda" or "cuda:1".

    CUDA computes in float32 proper unless `tf32` is asked for: with TF32, onnxruntime's default,
    errors are a thousand times larger.

    Raises:
        ProviderError: Another provider.
    """
    kind, colon, index = str(provider).partition(":")
    if kind == "cpu" and not colon:
        return _CPU, {}
    if kind == "cuda" and (index.isdecimal() or not colon):
        return _CUDA, {"device_id": index or "0", "use_tf32": str(int(tf32))}
    raise ProviderError(f"provider={provider!r} is unknown; use 'cpu', 'cuda' or 'cuda:1'")


@dataclass(frozen=True)
class SessionSettings:
    """How a session is opened."""

    #: Of one operator on the CPU; 0 lets onnxruntime choose.
    num_threads: int = 0
    #: Whether CUDA must take every node, so that nothing runs on the CPU.
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


def open_session(
    model: str | Path | bytes, provider: str = "cpu", settings: SessionSettings | None = None
) -> Any:
    """An `onnxruntime.InferenceSession` on one provider.

    Args:
        model: Path of an ONNX file, or its bytes.
        provider: "cpu", "cuda" or "cuda:1".
        settings: How to open it.

    Raises:
        ProviderError: CUDA was asked for and cannot run the graph; the message holds the cause.
        VerificationError: onnxruntime cannot read or run the model.
    """
    how = settings or SessionSettings()
    name, entries = execution_provider(provider, tf32=how.tf32)
    ort = load_onnxruntime(cuda=name == _CUDA)
    options = _options(ort, how, cuda=name == _CUDA)
    source = model if isinstance(model, bytes) else str(model)
    what = "the model" if isinstance(model, bytes) else str(model)
    try:
        with _quiet(ort):
            session = ort.InferenceSession(source, options, providers=[(name, entries)])
    except runtime_errors() as error:
        if name == _CUDA:
            cause = cuda_problem() or str(error)
            raise ProviderError(f"CUDA did not run {what}: {cause}; {_REMEDY}") from error
        raise VerificationError(f"onnxruntime cannot open {what}: {error}") from error
    if name not in session.get_providers():
        cause = cuda_problem() or f"it offers {session.get_providers()}"
        raise ProviderError(f"onnxruntime did not start {name} for {what}: {cause}; {_REMEDY}")
    return session


def _options(ort: Any, how: SessionSettings, *, cuda: bool) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = how.num_threads
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if how.without:
        options.add_session_config_entry("optimization.disable_specified_optimizers", how.without)
    if cuda and how.strict:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    if not how.optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if how.profile:
        options.enable_profiling = True
        options.profile_file_prefix = how.profile
    if how.weights:
        key = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(key, how.weights)
    return options


def nodes_by_provider(session: Any) -> dict[str, int]:
    """How many nodes of the optimised graph each execution provider was given."""
    counts: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        counts[str(part.ep_name)] += len(part.get_nodes())
    return dict(counts)


def require_provider(session: Any, provider: str) -> dict[str, int]:
    """`nodes_by_provider`, after checking that `provider` and no other runs the graph.

    Raises:
        ProviderError: Another provider holds a node, or the session has switched.
    """
    name, _ = execution_provider(provider)
    counts = nodes_by_provider(session)
    others = {other: n for other, n in counts.items() if other != name}
    if others or name not in session.get_providers():
        raise ProviderError(f"{name} was asked for, but nodes ran elsewhere: {others or counts}")
    return counts


def cuda_unavailable_reason() -> str | None:
    """Why onnxruntime cannot run a node on CUDA here; None where it can."""
    return unavailable_reason("cuda")


def unavailable_reason(provider: str) -> str | None:
    """Why onnxruntime cannot run a node on `provider` here; None where it can."""
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "probe",
        [value("x", TensorProto.FLOAT, [1])],
        [value("y", TensorProto.FLOAT, [1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    try:
        session = open_session(model.SerializeToString(), provider)
        session.run(None, {"x": np.zeros(1, np.float32)})
        require_provider(session, provider)
    except (ProviderError, VerificationError) as error:
        return str(error)
    return None


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
    if _CUDA not in ort.get_available_providers():
        return "this onnxruntime was built without CUDA (it is the CPU package)"
    library = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_shared.so"
    try:
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(library.with_name("libonnxruntime_providers_cuda.so")))
    except OSError as error:
        mismatch = cuda_mismatch()
        return f"{error} ({mismatch})" if mismatch else str(error)
    return None
