"""How accurate a classifier is, clean and under attack, whether its figures can be trusted, and what its membranes look like.

To add a suite: a function in `suites`, and its row in SUITES. To add a check: a function in `checks`, and its row in CHECKS.
"""

from __future__ import annotations

from ..attacks import default_eot
from .checks import CHECKS
from .forward import accuracy
from .membranes import LayerDiagnosis, diagnose
from .results import Check, Evaluation, Result, size_text, wilson
from .running import evaluate
from .store import ResumeError
from .suites import SUITES, Suite, make_suite

__all__ = [
    "CHECKS",
    "SUITES",
    "Check",
    "Evaluation",
    "LayerDiagnosis",
    "ResumeError",
    "Result",
    "Suite",
    "accuracy",
    "default_eot",
    "diagnose",
    "evaluate",
    "make_suite",
    "size_text",
    "wilson",
]
