"""Memory for large results on a CPU, kept between calls.

A fresh tensor of many megabytes is mapped page by page while it is first written, which costs several times what the
kernel does. So large results live in blocks that are used again once the tensor in them is gone. All blocks together
never hold more than the results of fastsnn have filled at one time; `release()` gives back what is free.
"""

from __future__ import annotations

import mmap
import sys
import threading

import torch
from torch import Tensor

__all__ = ["empty_strided", "release"]

#: Smaller tensors come from torch: its allocator finds them again quickly.
SMALLEST = 4 << 20

_lock = threading.Lock()
_blocks: list[mmap.mmap] = []  # the one used last stands last
_most_live = 0
# A free block is known to the list, to the loop that looks, and to getrefcount; a tensor in it adds one more.
_FREE = 3


def _take(size: int) -> mmap.mmap:
    global _most_live
    with _lock:
        live, fit, free = 0, None, []
        for block in _blocks:
            if sys.getrefcount(block) > _FREE:
                live += len(block)
            elif len(block) == size and fit is None:
                fit = block
            else:
                free.append(block)
        _most_live = max(_most_live, live + size)
        if fit is None:
            # Make room in the order of disuse: what is held stays below what was once in use at the same time.
            held = live + size + sum(map(len, free))
            while free and held > _most_live:
                oldest = free.pop(0)
                held -= len(oldest)
                _blocks.remove(oldest)
                del oldest
            fit = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                fit.madvise(mmap.MADV_HUGEPAGE)
        else:
            _blocks.remove(fit)
        _blocks.append(fit)
        return fit


def empty_strided(sizes: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As `torch.empty_strided` for dense strides; large CPU tensors lie in a block that is kept."""
    elements = 1
    for size in sizes:
        elements = elements * size
    if device.type != "cpu" or type(elements) is not int or elements * dtype.itemsize < SMALLEST or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty_strided(sizes, strides, dtype=dtype, device=device)
    storage = torch.frombuffer(_take(elements * dtype.itemsize), dtype=dtype).untyped_storage()
    tensor = torch.empty(0, dtype=dtype).set_(storage, 0, sizes, strides)
    if torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory:
        tensor.fill_(float("nan"))  # as torch.empty does then
    return tensor


def release() -> int:
    """Give free blocks back to the system; returns the bytes."""
    given = 0
    with _lock:
        kept = []
        for block in _blocks:
            if sys.getrefcount(block) > _FREE:
                kept.append(block)
            else:
                given += len(block)
        _blocks[:] = kept
    return given
