# ---
# jupyter:
#   jupytext: {text_representation: {extension: .py, format_name: percent}}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Slim and fast
#
# Folding takes operators away, and where branches are parallel and linear it makes one convolution of them.
# What that buys depends on the runtime: measure it.

# %%
import tempfile
from pathlib import Path

import torch
from torch import nn

import bnfx

torch.manual_seed(0)
torch.set_num_threads(1)


class RepBlock(nn.Module):
    """Three branches that are trained apart, as in RepVGG."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        )
        self.narrow = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))
        self.straight = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.wide(x) + self.narrow(x) + self.straight(x))


net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *(RepBlock(16) for _ in range(3)))
net.train()(torch.randn(8, 3, 32, 32))
net.eval()
images = torch.randn(1, 3, 32, 32)

folded = bnfx.fold_bn(net)
bnfx.report(folded)

# %%
kinds = [str(node.target) for node in folded.graph.nodes if "conv" in str(node.target)]
print(len(kinds), "convolutions, of", sum(isinstance(m, nn.Conv2d) for m in net.modules()))

# %% [markdown]
# Two files, measured in turns, so that both meet the same machine:

# %%
folder = Path(tempfile.mkdtemp())
bnfx.export_onnx(net, (images,), folder / "unfolded.onnx")
bnfx.export_onnx(folded, (images,), folder / "folded.onnx")
assert bnfx.verify_onnx(net, folder / "folded.onnx", (images,))
bnfx.benchmark_onnx(
    folder / "folded.onnx", (images,), baseline=folder / "unfolded.onnx", num_runs=50
)

# %% [markdown]
# `thresholds=True` and `border_maps=True` take more BatchNorms away and may cost time in a runtime whose fused
# kernels have no such form; `merge_branches=False` keeps branches apart. The report of `bnfx bench` and the
# [results](../results/folding.md) say where each paid.

# %% [markdown]
# Training with an L1 penalty on the gammas leaves many of them at zero. What they scale is dead: `drop_dead=True`
# takes such channels out of every layer that carries them, and the function stays the same. Widths are rounded up
# to `block`, 16 by default, as most targets compute whole blocks. `examples/slim.py` does this on MNIST.

# %%
slim = nn.Sequential(
    nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 8, 3, padding=1)
).eval()
with torch.no_grad():
    slim[1].weight[:40] = 0  # stands for the training
narrow = bnfx.fold_bn(slim, drop_dead=True)
for name, weight in narrow.named_parameters():
    print(name, tuple(weight.shape))
torch.testing.assert_close(narrow(images), slim(images))

# %% [markdown]
# Or let `deploy` measure them: `tune=True` folds in each way that is left open, runs the files in turns on the
# provider, and keeps the fastest that passes (`bnfx deploy ... --tune`).

# %%
bnfx.deploy(net, (images,), folder / "tuned.onnx", tune=True).tuning
