"""scikit-learn's handwritten digits, and plain SGD on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

TEST_IMAGES = 360
BATCH = 60


@dataclass(frozen=True)
class Digits:
    """Images in [0, 1], (N, 1, 8, 8) float32, and labels, (N,) int64; split once at random."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Run:
    """A trained network, in eval mode, and its accuracy on the test images along the way."""

    model: nn.Module
    steps: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)


def load(seed: int) -> Digits:
    """All 1,797 images; 360 of them, drawn at random, are for testing."""
    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(raw.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    test, train = order[:TEST_IMAGES], order[TEST_IMAGES:]
    return Digits(images[train], labels[train], images[test], labels[test])


def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Predicted labels, in eval mode; the training flags of the modules come back."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.no_grad():
        labels: Tensor = model(images).argmax(1)
    for module, flag in flags:
        module.training = flag
    return labels


def share(labels: Tensor, truth: Tensor) -> float:
    """Share of labels that are right."""
    return (labels == truth).float().mean().item()


def train(
    model: nn.Module, data: Digits, *, lr: float, steps: int, tick: Callable[[], object]
) -> Run:
    """SGD without momentum on the cross entropy; the learning rate falls linearly to zero."""
    run = Run(model.train())
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    draw = torch.Generator().manual_seed(0)
    every = max(1, steps // 60)
    for step in range(steps + 1):
        if step % every == 0 or step == steps:
            run.steps.append(step)
            run.accuracy.append(share(predict(model, data.test_images), data.test_labels))
        if step == steps:
            break
        batch = torch.randint(len(data.train_images), (BATCH,), generator=draw)
        optimizer.zero_grad()
        F.cross_entropy(model(data.train_images[batch]), data.train_labels[batch]).backward()
        optimizer.step()
        schedule.step()
        tick()
    model.eval()
    return run
