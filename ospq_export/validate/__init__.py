"""Stage 3, validate: does the deployed file predict what was calibrated?

Imports neither `calibrate` nor `export`.
"""

from ospq_export.validate.parity import Thresholds, default_thresholds
from ospq_export.validate.report import Report, render
from ospq_export.validate.stage import DEFAULT_BACKENDS, validate

__all__ = ["DEFAULT_BACKENDS", "Report", "Thresholds", "default_thresholds", "render", "validate"]
