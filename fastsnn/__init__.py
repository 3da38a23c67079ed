"""fastsnn: the fastest spiking neurons in PyTorch, and an honest house for attacking and defending them."""

from pathlib import Path as _Path

__version__ = "0.1.0"

if not (_Path(__file__).parent / "kernels").exists():  # a checkout: kernels/ stands beside this folder
    __path__.append(str(_Path(__file__).resolve().parent.parent))

from . import surrogates
from .adjoints import adjoint
from .functional import Output, Statistics, lif
from .neurons import IF, LI, LIF, Neuron, NoisyLIF, ParametricLIF, record

_LAZY = ("activity", "attacks", "coding", "conversion", "corruptions", "data", "defenses", "distributed", "encodings", "evaluation", "landscapes", "models", "norm", "paper_neurons", "report", "training")


def __getattr__(name: str):
    """`fastsnn.models` and the other storeys are imported when they are first used."""
    if name == "convert":
        from .conversion import convert

        return convert
    if name not in _LAZY:
        raise AttributeError(f"module 'fastsnn' has no attribute {name!r}")
    import importlib

    return importlib.import_module(f"fastsnn.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, "convert"})


__all__ = [
    "IF",
    "LI",
    "LIF",
    "Neuron",
    "NoisyLIF",
    "Output",
    "ParametricLIF",
    "Statistics",
    "adjoint",
    "lif",
    "record",
    "surrogates",
]
