"""What the arguments say, read and judged before any work is done and before torch is imported."""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import sys
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bnfx.cli.specs import LIBRARIES, MOST_BYTES, parse_dynamic, parse_factory, parse_input
from bnfx.errors import MissingPackageError, ProviderError, UsageError
from bnfx.runtime.packages import runtime_cuda
from bnfx.runtime.providers import CUDA, LIBRARY, Where
from bnfx.version import OPSETS

#: Endings of checkpoints.
CHECKPOINTS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")

_PLAIN_BYTES, _MOST_RATIO = 2**28, 100  # an archive that inflates further is made to do harm


@dataclass(frozen=True)
class Takes:
    """What a command works on."""

    #: Whether its MODEL may be one of torch.
    modules: bool = True
    #: Whether it may be an `.onnx` file.
    onnx: bool = False
    #: Whether a model of torch needs example inputs.
    inputs: bool = False
    #: Endings of the FILE that it writes; none where FILE is read.
    writes: tuple[str, ...] = ()
    #: Endings of the FILE that it must write where its MODEL is an `.onnx` file.
    rewrites: tuple[str, ...] = ()


def check(options: argparse.Namespace) -> None:
    """Refuse arguments that cannot be meant, and an environment that cannot do it.

    Raises:
        UsageError: Arguments that are wrong or missing; a file that is not there, or could not be
            written in the end.
        ProviderError: onnxruntime is asked for and cannot run here.
    """
    given, takes = vars(options), options.takes
    if takes is None:
        return
    where = _where(options) if "provider" in given else None
    target = given.get("file")
    file = takes.onnx and options.model.endswith(".onnx")
    if file and takes.rewrites and target is None:
        raise UsageError("name the FILE to write; it may be the one that is read")
    if target is not None and takes.writes:
        check_target(Path(target), (takes.rewrites if file else ()) or takes.writes)
    for name in (options.model, None if takes.writes else target, given.get("baseline")):
        if name is not None and (name != options.model or name.endswith((".onnx", ".pt2"))):
            require_file(name)
    if not (file or takes.modules):
        raise UsageError(f"{options.model}: this takes an .onnx file")
    if not file and not options.model.endswith(".pt2"):
        _module(parse_factory(options.model).module, options.model)
    if given.get("init") == "calibrate" and not options.calibration:
        raise UsageError("--init calibrate needs its data: --calibration FILE.npz for each batch")
    if given.get("calibration") and options.init != "calibrate":
        raise UsageError(f"--init {options.init} uses no data: leave --calibration out")
    _inputs(options, file=file)
    if given.get("checkpoint") is not None:
        _checkpoint(Path(options.checkpoint))
    elif given.get("checkpoint_key") is not None:
        raise UsageError("--checkpoint-key needs a --checkpoint to look into")
    outputs = given.get("output_name") or ()
    if "" in outputs or len(set(outputs)) < len(outputs):
        raise UsageError(
            f"--output-name: {', '.join(map(repr, outputs))} are no names to tell apart"
        )
    if given.get("opset") is not None and options.opset not in OPSETS:
        raise UsageError(
            f"--opset {options.opset} cannot be written: {OPSETS[0]} to {OPSETS[-1]} can"
        )
    if where is not None:
        _runtime(where)


def require_file(name: str) -> None:
    """Refuse a file that is not there.

    Raises:
        UsageError: It is not.
    """
    if not Path(name).is_file():
        made = "; torch.export.save writes one" if name.endswith(".pt2") else ""
        raise UsageError(f"there is no file {name}{made}")


def check_target(path: Path, suffixes: Sequence[str]) -> None:
    """Refuse a file that could not be written in the end.

    Raises:
        UsageError: Its folder does not exist, it is a folder, a device or a pipe, or its name ends
            in something else.
    """
    if suffixes and path.suffix not in suffixes:
        raise UsageError(f"{path}: its name must end in {', '.join(suffixes)}")
    try:
        path.exists()
    except (OSError, ValueError) as error:  # too long, or with a null character
        raise UsageError(f"{path} cannot be the name of a file: {error}") from error
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}")
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give the name of a file")
    if suffixes and path.exists() and not path.is_file():
        raise UsageError(f"{path} is a device or a pipe, not to be replaced; give a file")


def check_reports(options: argparse.Namespace) -> None:
    """Refuse reports that could not be written in the end.

    Raises:
        UsageError: Two of them want standard output; a folder does not exist; a report would
            overwrite another file of the same command.
    """
    names = [options.json, options.markdown, options.html]
    if names.count("-") > 1:
        raise UsageError("only one report fits on standard output")
    taken = {Path(name).resolve() for name in _files(options)}
    for name in names:
        if name in (None, "-"):
            continue
        path = Path(name)
        check_target(path, ())
        if path.resolve() in taken and (path.is_file() or not path.exists()):
            raise UsageError(f"{name} is another file of this command; give the report its own")
        taken.add(path.resolve())


def _files(options: argparse.Namespace) -> Iterator[str]:
    """The files that a command reads and writes besides its reports."""
    for name in ("model", "file", "checkpoint", "baseline"):
        value = getattr(options, name, None)
        if value is not None:
            yield value
    yield from getattr(options, "input", ())
    yield from getattr(options, "calibration", None) or ()


def _module(name: str, spec: str) -> None:
    """Refuse a module that is not there; the import itself comes later, with torch."""
    here = str(Path.cwd())
    if here not in sys.path:  # `python -m` puts it there, the console script does not
        sys.path.insert(0, here)
    top = name.partition(".")[0]
    try:
        found = top in sys.modules or importlib.util.find_spec(top) is not None
    except (ImportError, ValueError):
        found = False
    if not found and top in LIBRARIES:
        raise MissingPackageError(
            f"model {spec!r} needs the package {top}; 'bnfx doctor' says how it is installed"
        )
    if not found:
        raise no_module(top, spec)


def no_module(name: str, spec: str) -> UsageError:
    """What is said where a module is not there."""
    return UsageError(
        f"model {spec!r}: there is no module {name!r} in the current directory nor among the "
        "installed packages"
    )


def _inputs(options: argparse.Namespace, *, file: bool) -> None:
    given = vars(options)
    own, specs = file or options.model.endswith(".pt2"), given.get("input", ())
    if not (own or specs) and needs_inputs(options):
        raise UsageError("this needs example inputs: --input NAME:1x3x224x224 or --input FILE.npz")
    drawn, free = [], bool(given.get("dynamic_batch"))
    for spec in specs:
        if spec.endswith(".npz"):
            check_archive(Path(spec))
        else:
            drawn.append(parse_input(spec))
    for name in given.get("calibration") or ():
        check_archive(Path(name))
    names = [one.name for one in drawn]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"input {twice[0]!r} is given twice")
    for spec in given.get("dynamic") or ():
        free |= parse_dynamic(spec)[1] == 0
    if len(drawn) == len(specs) and drawn and "dynamic" in given and not own:
        batches = [one.shape[0] for one in drawn if one.shape]
        require_batches(given.get("batch_sizes"), batches, free=free)


def needs_inputs(options: argparse.Namespace) -> bool:
    """Whether the command cannot do without example inputs of its model."""
    takes: Takes = options.takes
    return takes.inputs or (bool(takes.writes) and (options.file or "").endswith(".pt2"))


def require_batches(sizes: Sequence[int] | None, own: Iterable[int], *, free: bool) -> None:
    """Refuse to run other batch sizes through a file whose batch is fixed.

    Raises:
        UsageError: Such a size is asked for.
    """
    if not free and sizes is not None and set(sizes) - set(own):
        raise UsageError(
            f"--batch-sizes {','.join(map(str, sizes))}: the batch of the file is fixed; export it "
            "with --dynamic-batch, or leave this out"
        )


def check_archive(path: Path) -> None:
    """Refuse an `.npz` that is not there, or inflates to more than anybody would store so.

    Raises:
        UsageError: It does.
    """
    if not path.is_file():
        raise UsageError(f"there is no file {path} to read inputs from")
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} is not a readable .npz of arrays: {error}") from error
    if size > MOST_BYTES or size > max(_PLAIN_BYTES, _MOST_RATIO * path.stat().st_size):
        raise UsageError(
            f"{path} has {path.stat().st_size:,} bytes and inflates to {size:,}; write arrays of "
            "that size with numpy.savez, without compression, or give a shape"
        )


def _checkpoint(path: Path) -> None:
    if path.suffix not in CHECKPOINTS:
        raise UsageError(f"checkpoint {path}: its name must end in {', '.join(CHECKPOINTS)}")
    if not path.is_file():
        raise UsageError(f"there is no checkpoint {path}")


def _where(options: argparse.Namespace) -> Where:
    """Where it is to run, if that can be meant."""
    try:
        return Where.of(options.provider, dict(options.provider_option), options.allow_on_cpu)
    except ProviderError as error:
        raise UsageError(f"--provider: {error}") from error


def _runtime(where: Where) -> None:
    """Refuse what onnxruntime's files or the driver already rule out."""
    if importlib.util.find_spec("onnxruntime") is None:
        raise ProviderError("onnxruntime is not installed; 'bnfx doctor' says what to install")
    if where.name != CUDA or LIBRARY in where.options:
        return
    why = "" if runtime_cuda() else "this onnxruntime is built without it"
    if not why:
        try:
            ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        except OSError:
            why = "there is no driver of NVIDIA (libcuda.so.1 does not load)"
    if why:
        raise ProviderError(f"CUDA was asked for: {why}; 'bnfx doctor' says what to do")
