"""Stage 3, validate: does the deployed file predict what was calibrated?

Imports neither `calibrate` nor `export`.
"""

from ospq_export.validate.documents import write_documents
from ospq_export.validate.report import Report, render
from ospq_export.validate.stage import DEFAULT_BACKENDS, validate
from ospq_export.validate.verdict import Thresholds, default_thresholds

__all__ = [
    "DEFAULT_BACKENDS",
    "Report",
    "Thresholds",
    "default_thresholds",
    "render",
    "validate",
    "write_documents",
]
