"""The pictures of `fastsnn report`: each function draws one picture, in light or in dark colours, and returns its PNG.

The same data give the same bytes: the user's matplotlib settings, the display and the clock play no part.
"""

from .bars import Bars, members
from .grounds import Ground, landscapes
from .histograms import Layer, membranes, window
from .images import Example, examples
from .lines import Curve, Panel, against_eps, against_steps, curves, errors_by_steps, layers_over_training
from .spectra import layers_under_attack

__all__ = [
    "Bars", "Curve", "Example", "Ground", "Layer", "Panel", "against_eps", "against_steps", "curves", "errors_by_steps", "examples", "landscapes", "layers_over_training",
    "layers_under_attack", "members", "membranes", "window",
]  # fmt: skip
