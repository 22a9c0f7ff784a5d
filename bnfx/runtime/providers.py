"""Execution providers by name: what each is called, what brings it, which options it is given."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bnfx.errors import ProviderError

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
#: The option, bnfx's own, that names the library of a provider that is a plugin.
LIBRARY = "library"


@dataclass(frozen=True)
class Provider:
    """An execution provider of onnxruntime."""

    #: As onnxruntime calls it.
    name: str
    #: What to install for it.
    wheels: str
    #: The option that takes the number of a device; "" where it has none.
    device_option: str = ""
    #: The memory that inputs and outputs can be bound in, by onnxruntime's name.
    memory: str = "cpu"


_NVIDIA = {"device_option": "device_id", "memory": "cuda"}

#: Short names. Any other provider goes by its full name.
SHORT: Mapping[str, Provider] = {
    "cpu": Provider(CPU, "onnxruntime"),
    "cuda": Provider(CUDA, "onnxruntime-gpu", **_NVIDIA),
    "tensorrt": Provider("TensorrtExecutionProvider", "onnxruntime-gpu and tensorrt", **_NVIDIA),
    "nvtensorrtrtx": Provider(
        "NvTensorRTRTXExecutionProvider", "onnxruntime-ep-nv-tensorrt-rtx", **_NVIDIA
    ),
    "openvino": Provider("OpenVINOExecutionProvider", "onnxruntime-openvino"),
    "coreml": Provider("CoreMLExecutionProvider", "onnxruntime on macOS"),
    "dml": Provider("DmlExecutionProvider", "onnxruntime-directml", "device_id"),
    "qnn": Provider("QNNExecutionProvider", "onnxruntime-qnn"),
    "rocm": Provider("ROCMExecutionProvider", "onnxruntime-rocm", "device_id"),
    "migraphx": Provider("MIGraphXExecutionProvider", "onnxruntime-migraphx", "device_id"),
    "webgpu": Provider("WebGpuExecutionProvider", "onnxruntime-webgpu"),
    "xnnpack": Provider("XnnpackExecutionProvider", "an onnxruntime built with --use_xnnpack"),
    "dnnl": Provider("DnnlExecutionProvider", "an onnxruntime built with --use_dnnl"),
    "cann": Provider("CANNExecutionProvider", "onnxruntime-cann", "device_id"),
    "vitisai": Provider("VitisAIExecutionProvider", "onnxruntime-vitisai"),
}
_FULL = {provider.name: provider for provider in SHORT.values()}


@dataclass(frozen=True)
class Where:
    """Where a graph is to run, as it was asked for."""

    #: Short or full name, with the number of a device: "cpu", "cuda:1", "QNNExecutionProvider".
    provider: str = "cpu"
    #: Options of the provider; `library` is the path of a plugin that has it.
    options: Mapping[str, str] = field(default_factory=dict)
    #: Operators that may run on the CPU all the same; None lets arithmetic of shapes alone.
    allow_on_cpu: Sequence[str] | None = None

    @classmethod
    def of(
        cls,
        provider: str,
        options: Mapping[str, object] | None = None,
        allow_on_cpu: Sequence[str] | None = None,
    ) -> Where:
        """What a caller asks for, looked at.

        Raises:
            ProviderError: The provider is unknown, or takes no options.
        """
        allowed = (allow_on_cpu,) if isinstance(allow_on_cpu, str) else allow_on_cpu
        told = {str(name): _text(value) for name, value in (options or {}).items()}
        if path := plugin_path(provider):  # another process does not know of it
            told.setdefault(LIBRARY, path)
        where = cls(provider, told, None if allowed is None else tuple(map(str, allowed)))
        if where.on_cpu and told:
            raise ProviderError(
                f"the CPU takes no options, and would not hear of {', '.join(told)}: leave "
                "provider_options out"
            )
        return where

    @property
    def name(self) -> str:
        """As onnxruntime calls it."""
        return _find(self.provider, self.options)[0].name

    @property
    def on_cpu(self) -> bool:
        """Whether it is onnxruntime's own CPU, which every session falls back to."""
        return self.name == CPU

    @property
    def on_nvidia(self) -> bool:
        """Whether it is a GPU of NVIDIA, where NVIDIA_TF32_OVERRIDE is heard."""
        return self.memory[0] == "cuda"

    @property
    def memory(self) -> tuple[str, int]:
        """The memory, and the number of the device, that inputs can be bound in."""
        found, index = _find(self.provider, self.options)
        chosen = self.options.get(found.device_option, index or "0")
        return found.memory, int(chosen) if chosen.isdecimal() and found.memory != "cpu" else 0

    def entries(self, *, tf32: bool) -> tuple[str, dict[str, str]]:
        """Name and options as a session takes them."""
        return execution_provider(self.provider, tf32=tf32, options=self.options)


def _text(value: object) -> str:
    """As onnxruntime reads it, whose switches are 0 and 1."""
    return str(int(value)) if isinstance(value, bool) else str(value)


def execution_provider(
    provider: str, *, tf32: bool = False, options: Mapping[str, str] | None = None
) -> tuple[str, dict[str, str]]:
    """Name and options in onnxruntime's terms of "cpu", "cuda:1", or another provider.

    CUDA computes in float32 proper unless `tf32` is asked for: with TF32, onnxruntime's default,
    errors are a thousand times larger. What `options` say comes last; whether it was heard, a
    canary tells.

    Raises:
        ProviderError: The provider is unknown.
    """
    given = dict(options or {})
    found, index = _find(provider, given)
    own: dict[str, str] = {}
    if index or found.name == CUDA:
        own[found.device_option] = index or "0"
    if found.name == CUDA:
        own["use_tf32"] = str(int(tf32))
    given.pop(LIBRARY, None)
    return found.name, own | given


def known(provider: str) -> bool:
    """Whether the name can be one of an execution provider."""
    try:
        _find(provider, {})
    except ProviderError:
        return False
    return True


def _find(provider: str, options: Mapping[str, str]) -> tuple[Provider, str]:
    """The provider, and the number of the device; "" without one."""
    kind, colon, index = str(provider).partition(":")
    found = SHORT.get(kind) or _FULL.get(kind)
    if found is None and (_is_full(kind) or (kind and (LIBRARY in options or plugin_path(kind)))):
        found = Provider(kind, "a wheel or a plugin that has it")
    if found is None:
        raise ProviderError(
            f"provider={provider!r} is unknown; use {', '.join(map(repr, SHORT))}, 'cuda:1' for "
            "the second device, the full name of an execution provider, or the name of a plugin "
            "with provider_options={'library': its path}"
        )
    if colon and not (index.isdecimal() and found.device_option):
        raise ProviderError(
            f"provider={provider!r} is unknown: {kind} takes "
            + ("a number, such as 'cuda:1'" if found.device_option else "no number of a device")
        )
    return found, index


def _is_full(name: str) -> bool:
    return re.fullmatch(r"\w+ExecutionProvider", name) is not None


def plugin_path(name: str) -> str:
    """Library of the provider `name` where that is a plugin registered in this process, or ""."""
    runtime = sys.modules.get("onnxruntime")
    if runtime is None:
        return ""
    try:
        devices = runtime.get_ep_devices()
    except AttributeError:  # onnxruntime before 1.22 knows no plugins
        return ""
    paths = (dict(d.ep_metadata).get("library_path", "") for d in devices if d.ep_name == name)
    return next(paths, "")


def installed_plugins() -> dict[str, str]:
    """Name of the provider -> module, of each installed package `onnxruntime-ep-NAME`.

    By agreement such a module has `get_ep_name` and `get_library_path`.
    """
    modules = {
        str(dist.metadata["Name"] or "").lower().replace("-", "_")
        for dist in importlib.metadata.distributions()
    }
    found = {}
    for module in sorted(name for name in modules if name.startswith("onnxruntime_ep_")):
        try:
            found[str(importlib.import_module(module).get_ep_name())] = module
        except (ImportError, AttributeError, OSError):  # a package that only reserves its name
            continue
    return found
