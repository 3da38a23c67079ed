"""Packages that only some parts need: imported when they are used, with an error that says what to install."""

from __future__ import annotations

import importlib
from types import ModuleType

#: Which package of the registry brings a module, where the names differ.
PACKAGES = {"sklearn": "scikit-learn", "PIL": "pillow"}


def need(module: str, extra: str) -> ModuleType:
    """Import `module` (dots allowed); where it is missing, an ImportError that names the package and the extra.

    >>> matplotlib = need("matplotlib", "train")
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        top = module.partition(".")[0]
        if error.name is not None and error.name.partition(".")[0] != top:
            raise  # it is there, but something that it needs is not
        raise ImportError(f"{PACKAGES.get(top, top)} is not installed; install it with: pip install 'fastsnn[{extra}]'", name=top) from None
