"""One training step as a CUDA graph: the launches of forward and backward pass are recorded once and replayed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["CapturedStep"]

WARM_UP = 3


class CapturedStep:
    """`compute(images, labels)`, which fills the gradients and returns tensors, captured for one shape of batch.

    Its results are the same tensors at each call, overwritten by the next. Numbers that `compute` reads stay what they
    were when the graph was captured. Random numbers are those that an uncaptured step draws from the same seed.
    """

    def __init__(self, compute: Callable, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images.clone(memory_format=torch.preserve_format), labels.clone()
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries allocate and choose algorithms before the capture
            for _ in range(WARM_UP):
                model.zero_grad(set_to_none=True)
                compute(self.images, self.labels)
        torch.cuda.current_stream().wait_stream(side)
        for buffer, before in buffers:
            buffer.copy_(before)
        model.zero_grad(set_to_none=True)  # the capture allocates gradients of its own
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph):
                self.results = compute(self.images, self.labels)
        except RuntimeError as error:
            raise RuntimeError(f"cuda_graphs: this step cannot be captured as a CUDA graph: {error}. Train without --cuda-graphs.") from error

    def __call__(self, images: Tensor, labels: Tensor):
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.graph.replay()
        return self.results
