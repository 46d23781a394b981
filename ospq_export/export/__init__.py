"""Stage 2, export: a calibrated run as QDQ ONNX, its float baseline, and the scales as JSON.

Imports neither `calibrate` nor `validate`.
"""

from ospq_export.export.stage import export

__all__ = ["export"]
