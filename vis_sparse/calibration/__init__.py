"""Calibration and search: what a model's visual tokens need, measured on samples, and the plans found from it.

`measure.calibrate` fills a `Calibration`; `search` finds plans. Nothing here imports torch until it runs, except the
modules that measure.
"""

from .measure import calibrate
from .result import Calibration

__all__ = ["Calibration", "calibrate"]
