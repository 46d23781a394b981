"""Stage 1, calibrate: observe ranges, then reconstruct slice by slice; writes the run directory.

Imports neither `export` nor `validate`.
"""

from ospq_export.calibrate.stage import calibrate

__all__ = ["calibrate"]
