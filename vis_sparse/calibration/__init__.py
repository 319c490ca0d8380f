"""Calibration: what a model's visual tokens need, measured on samples. Nothing here imports torch until it runs,
except the modules that measure."""
