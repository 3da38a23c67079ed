"""From a network of ReLU to one of spiking neurons: weights kept, thresholds balanced on data.

    snn, report = fastsnn.convert(ann, images, steps=8)                        # robust conversion, to be fine-tuned
    snn, report = fastsnn.convert(ann, images, steps=64, method="plain")       # no fine-tuning: many steps
    print(report)
"""

from __future__ import annotations

from .converting import METHODS, convert
from .rates import rate_errors
from .report import Layer, Report

__all__ = ["METHODS", "Layer", "Report", "convert", "rate_errors"]
