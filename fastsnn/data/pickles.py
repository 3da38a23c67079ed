"""Pickles of dictionaries, lists, strings, numbers and arrays of numbers; anything else in one is refused, not run.

A pickle is a program: it names functions and calls them. Here every name that it may use leads to one of three stand-ins,
which take the place of numpy's own and only hold what they are given; arrays are made, with checks, after the program's end.
"""

from __future__ import annotations

import io
import pickle
import re

import numpy as np


class Refused(ValueError):
    """The pickle asks for something that is neither plain data nor an array."""


class _Type:
    """Stands for numpy.dtype: the code of a number such as u1, and its byte order."""

    def __init__(self, code: object = "", *_) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[|<>=]?(b1|[iu][1248]|f[248])", code):
            raise Refused(f"an array of type {code!r}; wanted numbers")
        self.code, self.order = code.lstrip("|<>="), code[0] if code[0] in "<>" else "="

    def __setstate__(self, state: tuple) -> None:
        if not (isinstance(state, tuple) and len(state) > 1 and state[1] in ("|", "<", ">", "=")):
            raise Refused(f"a type with the state {state!r}")
        self.order = state[1].replace("|", "=")

    def dtype(self) -> np.dtype:
        return np.dtype(self.order + self.code)


class _Array:
    """Stands for numpy.ndarray and the two functions that rebuild one (by protocol below 5, and 5)."""

    def __init__(self, *arguments) -> None:
        self.parts = None
        if len(arguments) == 4:  # _frombuffer(buffer, dtype, shape, order)
            self.parts = (*arguments[:3], arguments[3] == "F")

    def __setstate__(self, state: tuple) -> None:
        if not (isinstance(state, tuple) and len(state) == 5):
            raise Refused("an array without its five parts")
        _, shape, kind, fortran, raw = state
        self.parts = (raw, kind, shape, bool(fortran))

    def array(self) -> np.ndarray:
        raw, kind, shape, fortran = self.parts or (None,) * 4
        if isinstance(raw, str):
            raw = raw.encode("latin1")  # Python 2 has one type for text and bytes
        if not (isinstance(raw, (bytes, bytearray)) and isinstance(kind, _Type) and isinstance(shape, tuple)):
            raise Refused("an array that is not bytes, a type and a shape")
        if not all(isinstance(size, int) and size >= 0 for size in shape):
            raise Refused(f"an array of shape {shape!r}")
        return np.frombuffer(raw, kind.dtype()).reshape(shape, order="F" if fortran else "C").copy()


class _Latin1:
    """Stands for _codecs.encode, through which Python 3 writes bytes by protocol 2 and below."""

    def __new__(cls, text: object, encoding: object) -> bytes:
        if not (isinstance(text, str) and encoding == "latin1"):
            raise Refused("a call of _codecs.encode that makes no bytes")
        return text.encode("latin1")

    def __setstate__(self, state: object) -> None:  # so that a pickle cannot set attributes of this class
        raise Refused("a state for a function")


#: Every name that a pickle may use.
ADMITTED = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _Latin1,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _Array for core in ("core", "_core")},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in ADMITTED:
            raise Refused(f"{module}.{name}")
        return ADMITTED[module, name]


def loads(raw: bytes, where: str) -> dict[str, object]:
    """The dictionary in a pickle, of Python 2 or 3, arrays as numpy arrays; ValueError where it is cut short, asks for more than data, or is no dictionary."""
    try:
        found = _Unpickler(io.BytesIO(raw), encoding="latin1").load()
        if not isinstance(found, dict):
            raise Refused(f"a {type(found).__name__} at its top; wanted a dictionary")
        return {
            key.decode("latin1") if isinstance(key, bytes) else key: value.array() if isinstance(value, _Array) else value for key, value in found.items()
        }
    except Refused as error:
        raise ValueError(f"data: {where} is a pickle with {error}. It is refused, and nothing in it was run; fetch the file from its official site.") from None
    except Exception as error:  # a wrong byte can make any opcode, and so any error
        raise ValueError(f"data: {where} is no whole pickle ({type(error).__name__}: {error}); wanted the whole file. Fetch it again.") from error
