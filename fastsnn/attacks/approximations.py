"""Gradient approximations by name: the ensemble of 19, and those that came after it.

The forward pass of a spiking network has no derivative; each row of APPROXIMATIONS is a way to give it one. `adjoint=` of
every attack takes these names, beside all that `fastsnn.adjoint` takes: `PGD(8 / 255, adjoint="exponential-0.3-1")`.

    triangle-w          BPTT with max(0, w - |z|)/w^2, z = membrane - threshold             SNN-RAT, NeurIPS 2022
    exponential-h-a     BPTT with h*exp(-a*|z|)                                             Shrestha and Orchard, NeurIPS 2018
    rectangle-w         BPTT with 1[|z| < w/2]/w                                            Wu et al., 2018
    ste                 BPTT with 1                                                         Bengio et al., 2013
    bptr                g_in[t] = g_out[t] * 1[mean over t of s > 0]                        SNN-RAT
    cba                 forward and backward through the ANN twin: relu(x) for spikes       robust conversion, appendix A.4
    rga                 a weight on the mean input, see `fastsnn.adjoint`                   Bu et al., CVPR 2023
    hart, hart-w        history cut, mean over t; triangle of width w; `hart` in an ensemble searches w in 0.10 ... 2.45
                        by 0.05, in another attack takes the layers' own surrogates         HART, ICLR 2024
    pdsg                BPTT with a normal density as wide as the membranes, see `PDSG`     CVPR 2025
    assg                BPTT with an arctangent that follows |z|, see `ASSG`                arXiv 2512.22522
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from torch import nn

from ..adjoints import adjoint, nearest
from ..surrogates import Exponential, Rectangle, StraightThrough, Surrogate, Triangle
from ..tables import ADJOINTS
from .adaptive import ASSG, PDSG, Adaptive, Pass, relu_twin

__all__ = ["APPROXIMATIONS", "ASSG", "ENSEMBLE", "EXTENDED", "HART_WIDTHS", "PDSG", "Approximation", "members_of", "resolve"]


@dataclass(frozen=True)
class Approximation:
    """One way to differentiate a spiking network.

    choice: what `fastsnn.adjoint` takes; None: whatever is in force. forward: (model, Pass) -> a block that yields what to
    run in place of the model, where the model's own pass does not serve. true: whether the logits found there are the model's.
    attempts: for an ensemble, the approximations that this one stands for.
    """

    name: str
    choice: str | Surrogate | Callable | tuple | None = None
    forward: Callable[[nn.Module, Pass], object] | None = None
    true: bool = True
    attempts: tuple[Approximation, ...] = ()

    @property
    def shares(self) -> bool:
        """Whether it is served by one forward pass of the model, together with others."""
        return self.forward is None

    def backward(self):
        """A block whose backward passes are by this approximation."""
        if self.choice is None:
            return nullcontext()
        return adjoint(*self.choice) if isinstance(self.choice, tuple) else adjoint(self.choice)

    @contextmanager
    def running(self, model: nn.Module, run: Pass) -> Iterator[nn.Module]:
        """A block that yields the module whose forward pass this approximation differentiates."""
        if self.forward is None:
            yield model
            return
        with self.forward(model, run) as module:
            yield module


def _adaptive(name: str, rule: Adaptive) -> Approximation:
    return Approximation(name, "bptt", rule.forward)


#: The widths that HART searches.
HART_WIDTHS: tuple[float, ...] = tuple(percent / 100 for percent in range(10, 250, 5))
_HART = tuple(Approximation(f"hart-{width:g}", ("hart", Triangle(width))) for width in HART_WIDTHS)

_ROWS = (
    *(Approximation(f"triangle-{width:g}", Triangle(width)) for width in (1, 2, 3, 0.5, 0.25)),
    *(Approximation(f"exponential-{height:g}-{slope:g}", Exponential(height, slope)) for height in (0.3, 1) for slope in (0.5, 1, 2)),
    *(Approximation(f"rectangle-{width:g}", Rectangle(width)) for width in (0.25, 0.5, 1, 2, 4)),
    Approximation("ste", StraightThrough()),
    Approximation("bptr", "bptr"),
    Approximation("cba", "bptt", relu_twin, true=False),
    Approximation("rga", "rga"),
    Approximation("hart", "hart", attempts=_HART),
    _adaptive("pdsg", PDSG()),
    _adaptive("assg", ASSG()),
)

#: Every approximation by its name.
APPROXIMATIONS: dict[str, Approximation] = {row.name: row for row in _ROWS}
#: The ensemble of 19 (robust conversion, appendix A.4), in its order.
ENSEMBLE: tuple[str, ...] = tuple(APPROXIMATIONS)[:19]
#: The ensemble of 19 and what came after it.
EXTENDED: tuple[str, ...] = tuple(APPROXIMATIONS)
#: Sets of members by name.
MEMBERS: dict[str, tuple[str, ...]] = {"ensemble": ENSEMBLE, "extended": EXTENDED}

_PLAIN = tuple(name for name in ADJOINTS if name not in APPROXIMATIONS)  # names of fastsnn.adjoint alone
_BY_NAME = APPROXIMATIONS | {row.name: row for row in _HART}


def resolve(choice: object) -> Approximation:
    """What `adjoint=` of an attack stands for: a name of APPROXIMATIONS, a `PDSG` or `ASSG`, or what `fastsnn.adjoint` takes.

    Raises ValueError for an unknown name, TypeError for other things.

    >>> resolve("triangle-2").choice
    Triangle(width=2, height=0.5)
    """
    if isinstance(choice, Approximation):
        return choice
    if isinstance(choice, Adaptive):
        return _adaptive(repr(choice), choice)
    if isinstance(choice, str) and choice not in _PLAIN:
        if choice not in _BY_NAME:
            known = (*APPROXIMATIONS, *_PLAIN)
            raise ValueError(f"adjoint: {choice!r} is unknown; wanted one of {', '.join(known)}, a surrogate, or a callable.{nearest(choice, tuple(_BY_NAME) + _PLAIN)}")
        return _BY_NAME[choice]
    found = Approximation(choice if isinstance(choice, str) else repr(choice), choice)
    with found.backward():  # a wrong one is told now
        pass
    return found


def members_of(members: str | Iterable) -> tuple[Approximation, ...]:
    """The members of an ensemble: "ensemble", "extended", names with commas between, or a list of anything that `resolve` takes.

    >>> [member.name for member in members_of("ste,bptr")]
    ['ste', 'bptr']
    """
    if isinstance(members, str):
        members = MEMBERS.get(members, tuple(name.strip() for name in members.split(",") if name.strip()))
    if not isinstance(members, Iterable):
        raise TypeError(f"members is {members!r}; wanted names of APPROXIMATIONS, surrogates or callables in a list, or one of {', '.join(MEMBERS)}.")
    found = tuple(resolve(member) for member in members)
    names = [member.name for member in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if not found or twice:
        raise ValueError(f"members holds {f'{twice[0]!r} twice' if twice else 'nothing'}; wanted one or more approximations, each once.")
    return found


def passes(ways: Sequence[Approximation]) -> list[list[int]]:
    """The places of `ways` by forward pass: all that share one, then each of the others."""
    together = [place for place, way in enumerate(ways) if way.shares]
    return [together] * bool(together) + [[place] for place, way in enumerate(ways) if not way.shares]
