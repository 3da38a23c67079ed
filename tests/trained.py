"""Trained networks for tests: a spiking one (T = 4) and an ANN, both small_cnn(widths=(8, 16, 32)) on digits.

Made by `fastsnn train --recipe digits --defense vanilla --model-options widths=[8,16,32] --out tests/networks/snn`, and by the same
recipe without its surrogate and with `--neuron relu` for tests/networks/ann; of both run.json and best.safetensors are kept.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from fastsnn import checkpoints, data
from torch import Tensor, nn

FOLDER = Path(__file__).parent / "networks"
NETWORKS = ("snn", "ann")


def network(name: str) -> nn.Module:
    """A fresh copy of "snn" or "ann", in eval mode."""
    return checkpoints.load_run(FOLDER / name)[0].eval()


@functools.cache
def _digits():
    return data.load("digits")


def digits(count: int = 500, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Images [count, 1, 8, 8] in [0, 1] and labels: the test images first, images of the training set after the 359th."""
    found = _digits()
    x, y = torch.cat([found.x_test, found.x_train])[:count], torch.cat([found.y_test, found.y_train])[:count]
    return x.to(dtype) / 255, y
