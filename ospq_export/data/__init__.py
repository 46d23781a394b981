"""Images on their way into a network: the preprocessing, where images come from, and batches of tensors.

Imports models and errors; knows nothing of graphs or run directories.
"""

from ospq_export.data.classes import ClassChoice, Classes, known_classes, number_classes
from ospq_export.data.config import DataConfig, ImagesRecord, resolve_data_config
from ospq_export.data.folders import scan_folder
from ospq_export.data.images import Batch, ImageSet

__all__ = [
    "Batch",
    "ClassChoice",
    "Classes",
    "DataConfig",
    "ImageSet",
    "ImagesRecord",
    "known_classes",
    "number_classes",
    "resolve_data_config",
    "scan_folder",
]
