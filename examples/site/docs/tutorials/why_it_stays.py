# ---
# jupyter:
#   jupytext: {text_representation: {extension: .py, format_name: percent}}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Why did this BatchNorm stay?
#
# A BatchNorm vanishes where the layers around it can take up its scale and its shift. Where they cannot, it
# stays one BatchNorm, and the report says what keeps it.

# %%
import torch
from torch import nn

import bnfx

torch.manual_seed(0)


def trained(net: nn.Module) -> nn.Module:
    """Stands for your training: every BatchNorm gets statistics and an affine map of its own."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    return net.eval()


between = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.BatchNorm2d(4), nn.Sigmoid()))
bnfx.plan_fold(between)

# %% [markdown]
# Nothing before or behind it has weights that could take it: a sigmoid lets no scale through. A layer behind
# it, and it goes:

# %%
before_conv = trained(nn.Sequential(nn.Sigmoid(), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)))
bnfx.plan_fold(before_conv)

# %% [markdown]
# ## Zero padding
#
# The convolution pads with zeros *behind* the BatchNorm: at the border it sees 0 and not the shifted value,
# so that the shift cannot go into its bias. `border_maps=True` allows a constant map in place of the bias; it
# ties the network to one size of image, which is why it is an option.

# %%
padded = trained(nn.Sequential(nn.Sigmoid(), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)))
bnfx.plan_fold(padded)

# %%
image = torch.randn(1, 3, 8, 8)
plan = bnfx.plan_fold(padded, image, border_maps=True)
assert [record.verdict for record in plan.batch_norms] == ["folded"]
plan

# %% [markdown]
# ## A shift in front of a ReLU
#
# In DenseNet and other networks with "pre-activation", BatchNorm and ReLU read what others read too. A ReLU is
# a threshold at 0; with `thresholds=True` the threshold may move, per channel.


# %%
class Dense(nn.Module):
    """One tensor, read plainly and through BatchNorm and ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.bn, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.bn2, self.head = nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.conv(torch.relu(self.bn(x)))
        return self.head(torch.relu(self.bn2(torch.cat((x, y), 1))))


dense = trained(Dense())
bnfx.plan_fold(dense)

# %%
bnfx.plan_fold(dense, thresholds=True)

# %% [markdown]
# ## In train mode
#
# The commonest reason of all:

# %%
bnfx.plan_fold(dense.train())
