"""Post-training quantization of vision transformers, from float weights to a file with proven accuracy.

Three stages that meet only in a run directory: `ospq_export.calibrate`, `ospq_export.export` and
`ospq_export.validate`. Nothing heavy is imported here, so that the command line answers at once.
"""

__version__ = "0.1.0"
