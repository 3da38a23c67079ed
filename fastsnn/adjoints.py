"""Which gradient flows through a layer, decided when the backward pass runs.

The forward pass does not depend on the surrogate, so one forward pass serves many backward passes. The setting is a
process-wide stack: thread-local or context variables would not reach the threads in which autograd runs on a GPU, and
an argument would be frozen when a graph is compiled.
"""

from __future__ import annotations

import difflib
import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from .surrogates import Surrogate
from .tables import ADJOINTS

#: (layer, mean [T, C], var [T, C]) -> the surrogate of that layer, for attacks whose surrogate follows the membrane.
SurrogateRule = Callable[[object, Tensor, Tensor], Surrogate]

_stack: list[tuple[str, Surrogate | SurrogateRule | None]] = []
_layers: weakref.WeakValueDictionary[int, object] = weakref.WeakValueDictionary()
_next_layer = itertools.count(1)


@dataclass(frozen=True)
class Choice:
    """What one layer's backward pass uses: an approximation by name, and a surrogate."""

    adjoint: str
    surrogate: Surrogate


def nearest(word: object, words: tuple[str, ...]) -> str:
    """`, did you mean ...?` for an unknown word, or nothing."""
    close = difflib.get_close_matches(str(word), words, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


@contextmanager
def adjoint(choice: str | Surrogate | SurrogateRule, surrogate: Surrogate | None = None) -> Iterator[None]:
    """Within this block, backward passes of every layer use `choice`; the innermost block counts.

    choice: a surrogate (backpropagation through time with it in place of the layer's own); or a name:
        `bptt` the exact adjoint of the recurrence with the layer's surrogate ·
        `bptr` `g_x[t] = g_s[t] * 1[mean over t of s > 0]` (SNN-RAT, NeurIPS 2022) ·
        `spatial` `g_x[t] = g_s[t] * surrogate(z[t]) * dh/dx`, the membrane's history cut ·
        `hart` `spatial`, averaged over t and repeated T times (HART, ICLR 2024) ·
        `rga` `g_x[t] = g_s[t] * w(mean over t of x / threshold) / threshold` (RGA, CVPR 2023);
        or a callable `(layer, mean, var) -> surrogate`, called with the layer (None for a bare `fastsnn.lif`) and the
        mean and biased variance `[T, C]` of its `z` (None without channels).
    surrogate: with a name, the surrogate to use with it; default the layer's own.

    Under a name other than `bptt` only the spikes pass a gradient, and only to x: the final state, the membrane and the
    statistics pass none, and v0, decay, threshold and gain get zero.

    The block is read when the backward pass runs, also in autograd's own threads and in compiled graphs. A captured
    CUDA graph keeps the choice of its capture.

    >>> with fastsnn.adjoint("bptr"):
    ...     grad, = torch.autograd.grad(loss, images, retain_graph=True)
    """
    if isinstance(choice, str):
        if choice not in ADJOINTS:
            raise ValueError(f"adjoint: {choice!r} is unknown; wanted one of {', '.join(ADJOINTS)}, a surrogate, or a callable.{nearest(choice, ADJOINTS)}")
        if surrogate is not None and not isinstance(surrogate, Surrogate):
            raise TypeError(f"adjoint: surrogate is a {type(surrogate).__name__}; wanted an instance from fastsnn.surrogates.")
        entry = (choice, surrogate)
    elif isinstance(choice, type) or not (isinstance(choice, Surrogate) or callable(choice)):
        raise TypeError(
            f"adjoint: got {choice!r}; wanted a name ({', '.join(ADJOINTS)}), an instance of a surrogate such as "
            "fastsnn.surrogates.Triangle(1.0), or a callable (layer, mean, var) -> surrogate."
        )
    elif surrogate is not None:
        raise ValueError("adjoint: surrogate goes with a name; the first argument is a surrogate or a callable already. Drop one.")
    else:
        entry = ("bptt", choice)
    _stack.append(entry)
    try:
        yield
    finally:
        # Blocks may be left out of order by generators: take out this entry, not simply the last one.
        for place in range(len(_stack) - 1, -1, -1):
            if _stack[place] is entry:
                del _stack[place]
                break


def register(layer: object) -> int:
    """A number by which the backward pass finds the layer again; the layer is not kept alive."""
    number = next(_next_layer)
    _layers[number] = layer
    return number


def choose(own: Surrogate, layer: int | Tensor, moments: Callable[[], tuple[Tensor | None, Tensor | None]]) -> Choice:
    """What to use now for a layer with the surrogate `own`; `moments` computes (mean, var) if a callable asks."""
    name, surrogate = _stack[-1] if _stack else ("bptt", None)
    if surrogate is None:
        surrogate = own
    elif not isinstance(surrogate, Surrogate):
        rule = surrogate
        surrogate = rule(_layers.get(int(layer)), *moments())
        if not isinstance(surrogate, Surrogate):
            raise TypeError(f"adjoint: the callable {rule!r} returned {type(surrogate).__name__}; wanted an instance from fastsnn.surrogates.")
    return Choice(name, surrogate)
