"""Stage 3, validate: is the deployment faithful to what was calibrated, and is accuracy kept?

Imports neither `calibrate` nor `export`.
"""

from ospq_export.validate.executions.table import DEFAULT_BACKENDS
from ospq_export.validate.report.documents import write_documents
from ospq_export.validate.report.model import Report
from ospq_export.validate.report.terminal import render
from ospq_export.validate.stage import validate
from ospq_export.validate.verdict import Thresholds

__all__ = [
    "DEFAULT_BACKENDS",
    "Report",
    "Thresholds",
    "render",
    "validate",
    "write_documents",
]
