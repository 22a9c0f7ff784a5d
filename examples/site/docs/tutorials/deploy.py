# ---
# jupyter:
#   jupytext: {text_representation: {extension: .py, format_name: percent}}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Deploy with proof
#
# `deploy` folds, exports, verifies, and only then moves the file into place. The reference is the network
# *before* folding, in float64; the limit is what float32 itself costs this network, so that there is no
# tolerance to guess.

# %%
import tempfile
from pathlib import Path

import onnx
import torch
from torch import nn

import bnfx

torch.manual_seed(0)


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + self.bn2(self.conv2(y)))


net = nn.Sequential(
    nn.Conv2d(3, 8, 3), Block(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
)
net.train()(torch.randn(32, 3, 16, 16))  # stands for your training: the statistics move
net.eval()

folder = Path(tempfile.mkdtemp())
images = torch.randn(2, 3, 16, 16)
report = bnfx.deploy(net, (images,), folder / "net.onnx", dynamic_shapes=({0: "batch"},))
report

# %% [markdown]
# What was proved, layer by layer: the worst error over what PyTorch itself does in float32. A ratio up to 4 is
# rounding; a wrong weight is off by thousands.

# %%
assert report
print("worst ratio:", round(report.verify.worst_ratio, 2))
print("nodes that ran:", dict(report.verify.providers))

# %% [markdown]
# ## Is the verifier awake?
#
# A weight changed by two percent, in one channel. The report names the layer and the channel.

# %%
model = onnx.load(folder / "net.onnx")
weights = next(t for t in model.graph.initializer if len(t.dims) == 4 and t.dims[0] == 8)
array = onnx.numpy_helper.to_array(weights).copy()
array[3] *= 1.02
weights.CopyFrom(onnx.numpy_helper.from_array(array, weights.name))
onnx.save(model, folder / "tampered.onnx")

failed = bnfx.verify_onnx(net, folder / "tampered.onnx", (images,))
assert not failed
print(failed.first_divergence)

# %% [markdown]
# ## Keep the evidence
#
# As JSON for programs, Markdown for a pull request, one HTML file for people.

# %%
for suffix in ("json", "md", "html"):
    report.save(folder / f"report.{suffix}")
print(sorted(path.name for path in folder.iterdir()))
