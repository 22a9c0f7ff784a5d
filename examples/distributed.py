"""Train a network with inserted BatchNorm on several processes, then fold it.

    torchrun --nproc-per-node 2 examples/distributed.py     # two processes: gloo, or NCCL with GPUs
    python examples/distributed.py                          # one process, the same result

DistributedDataParallel averages gradients, but on the CPU each process normalises its own part of
the batch. `--shards` is the number of parts, however many processes share them, so that the result
does not depend on how many there are. With GPUs, SyncBatchNorm normalises over the parts of all
processes together instead.

The running statistics that training leaves behind are those of the first process. At the end
`bnfx.recalibrate_bn` takes them anew from all training images: each process reads its share, and
the moments are merged.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from networks import ConvNet
from rich.console import Console
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from training import BATCH, Images, load, predict, share

import bnfx


@contextlib.contextmanager
def process_group() -> Iterator[torch.device]:
    """Join the processes that torchrun started, if it did; the device of this one."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else None
    if "RANK" not in os.environ:
        yield device or torch.device("cpu")
        return
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device)
    try:
        yield device or torch.device("cpu")
    finally:
        dist.destroy_process_group()


def rank_and_world() -> tuple[int, int]:
    """Number of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def build(device: torch.device) -> nn.Module:
    """The network with BatchNorm, alike in all processes because of the seed."""
    torch.manual_seed(0)
    net: nn.Module = bnfx.insert_bn(ConvNet()).to(device)
    if dist.is_initialized() and device.type == "cuda":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    return net


def train(net: nn.Module, data: Images, *, steps: int, shards: int) -> None:
    """Plain SGD; each step takes one batch, of which each process computes its shards."""
    rank, world = rank_and_world()
    mine = range(rank * shards // world, (rank + 1) * shards // world)
    parallel = DistributedDataParallel(net) if dist.is_initialized() else None
    model = parallel or net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = torch.randint(len(data.train_images), (BATCH,), generator=draw).chunk(shards)
        optimizer.zero_grad()
        for shard in mine:
            last = shard == mine[-1]  # gradients travel once for each step
            with contextlib.nullcontext() if parallel is None or last else parallel.no_sync():
                chosen = batch[shard]
                loss = F.cross_entropy(model(data.train_images[chosen]), data.train_labels[chosen])
                (loss / len(mine)).backward()
        optimizer.step()


def share_of_images(data: Images) -> Iterator[Tensor]:
    """The batches of training images that this process reads for the statistics.

    Every `world`-th batch, so that the batches are those of one process, shared out.
    """
    rank, world = rank_and_world()
    return iter(data.train_images.split(BATCH)[rank::world])


def main(argv: list[str]) -> int:
    """Train, take the statistics anew, fold; the first process reports."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--shards", type=int, default=2, help="parts of a batch, normalised apart")
    parser.add_argument("--double", action="store_true", help="float64, to compare two runs")
    parser.add_argument("--out", type=Path, default=Path("demo", "distributed"))
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    with process_group() as device:
        rank, world = rank_and_world()
        if options.shards < 1 or options.shards % world or BATCH % options.shards:
            parser.error(f"--shards must be a multiple of {world} processes and divide {BATCH}")
        dtype = torch.float64 if options.double else torch.float32
        data = load(seed=0).to(device, dtype)
        net = build(device).to(dtype)
        train(net, data, steps=options.steps, shards=options.shards)
        bnfx.recalibrate_bn(net, share_of_images(data), progress=False)
        folded = bnfx.fold_bn(net.eval())
        if rank == 0:
            _report(net, folded, data, options.out, world)
    return 0


def _report(net: nn.Module, folded: nn.Module, data: Images, out: Path, world: int) -> None:
    accuracy = {
        name: share(predict(model, data.test_images), data.test_labels)
        for name, model in (("with BatchNorm", net), ("folded", folded))
    }
    out.mkdir(parents=True, exist_ok=True)
    torch.save({k: v.cpu() for k, v in net.state_dict().items()}, out / "net.pt")
    (out / "report.json").write_text(json.dumps({"processes": world, "accuracy": accuracy}) + "\n")
    for name, value in accuracy.items():
        Console().print(f"{world} process(es), {name}: {value:.2%} of the test images")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
