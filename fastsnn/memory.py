"""Memory for large results on a CPU, kept between calls.

A fresh tensor of many megabytes is mapped page by page while it is first written, which costs several times what the
kernel does. So large results live in blocks that are used again once the tensor in them is gone. All blocks together
never hold more than 1.5 times what the results of fastsnn have filled at one time; `release()` gives back what is free.
"""

from __future__ import annotations

import contextlib
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


def _references(blocks: list[mmap.mmap]) -> list[int]:
    return [sys.getrefcount(block) for block in blocks]


# How often a block is referred to while no tensor lies in it; interpreters differ in what they count.
_FREE = _references([mmap.mmap(-1, mmap.PAGESIZE)])[0]


def _counted() -> tuple[list[mmap.mmap], list[int]]:
    counts = _references(_blocks)  # before anything else refers to them
    return _blocks[:], counts


# Without a global lock a count may be out of date when it is read.
_usable = hasattr(mmap, "MAP_PRIVATE") and getattr(sys, "_is_gil_enabled", lambda: True)()


def _take(size: int) -> mmap.mmap:
    global _most_live
    with _lock:
        live, fit, free = 0, None, []
        for block, references in zip(*_counted()):
            if references > _FREE:
                live += len(block)
            elif len(block) == size and fit is None:
                fit = block
            else:
                free.append(block)
        _most_live = max(_most_live, live + size)
        if fit is None:
            # Make room in the order of disuse. The half above what was in use at one time lets a small state keep its
            # block beside those of large results, which would else be mapped anew at each call.
            held = live + size + sum(map(len, free))
            while free and held > _most_live + _most_live // 2:
                oldest = free.pop(0)
                held -= len(oldest)
                _blocks.remove(oldest)
                del oldest
            fit = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with contextlib.suppress(OSError):  # a kernel without large pages
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
    if device.type != "cpu" or type(elements) is not int or elements * dtype.itemsize < SMALLEST or not _usable:
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
        for block, references in zip(*_counted()):
            if references > _FREE:
                kept.append(block)
            else:
                given += len(block)
        _blocks[:] = kept
    return given
