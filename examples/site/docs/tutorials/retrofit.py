# ---
# jupyter:
#   jupytext: {text_representation: {extension: .py, format_name: percent}}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Retrofit a trained network
#
# A network that was trained without BatchNorm gets it, loses nothing of what it has learned, and trains on
# at a rate that it could not have taken before.

# %%
import copy

import torch
from sklearn.datasets import load_digits
from torch import nn

import bnfx

torch.manual_seed(0)
torch.set_num_threads(1)
data = load_digits()
x = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
y = torch.tensor(data.target)
train_x, train_y, test_x, test_y = x[:1400], y[:1400], x[1400:], y[1400:]


def learn(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> float:
    """Train, and tell the accuracy on images that were not learned."""
    net.train()
    for _ in range(steps):
        chosen = torch.randint(len(train_x), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(train_x[chosen]), train_y[chosen]).backward()
        optimizer.step()
    return accuracy(net)


def accuracy(net: nn.Module) -> float:
    """On the test images, in percent."""
    net.eval()
    with torch.no_grad():
        return round(100 * float((net(test_x).argmax(1) == test_y).float().mean()), 1)


trained = nn.Sequential(
    nn.Conv2d(1, 16, 3),
    nn.ReLU(),
    nn.Conv2d(16, 32, 3),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(512, 10),
)
optimizer = torch.optim.SGD(trained.parameters(), lr=0.05, momentum=0.9)
learn(trained, optimizer, 150)

# %% [markdown]
# Calibration sets each BatchNorm so that it is the identity on your data: same outputs, and statistics that
# are those of the data. The optimizer goes on with its momentum; the new parameters are in it.

# %%
batches = [train_x[i : i + 100] for i in range(0, 600, 100)]
plain, own = copy.deepcopy(trained), copy.deepcopy(optimizer)
net = bnfx.insert_bn(trained, init="calibrate", calibration_data=batches, optimizer=optimizer)
bnfx.report(net)

# %%
before, after = accuracy(trained), accuracy(net)
print(f"before {before} %, with BatchNorm {after} %")
assert abs(before - after) < 1

# %% [markdown]
# Now ten times the rate, for both:

# %%
for group in optimizer.param_groups:
    group["lr"] = 0.5
fast = torch.optim.SGD(plain.parameters(), lr=0.5, momentum=0.9)
print("without BatchNorm:", learn(plain, fast, 150), "%")
print("with BatchNorm:   ", learn(net, optimizer, 150), "%")

# %% [markdown]
# A checkpoint from before the insertion still loads: parameters keep their names, and the folded network has
# those of the source again.

# %%
folded = bnfx.fold_bn(net.eval())
assert set(folded.state_dict()) == set(plain.state_dict())
torch.testing.assert_close(folded(test_x), net(test_x), rtol=1e-3, atol=1e-3)
bnfx.report(folded)
