"""Images on their way into a network: the preprocessing, where images come from, and batches of tensors.

`open_source` finds images wherever they are, and `image_set` prepares them for a network. Imports models and errors; knows
nothing of graphs or run directories.
"""

from ospq_export.data.choice import ClassChoice, Classes
from ospq_export.data.classes import known_classes, number_classes
from ospq_export.data.config import DataConfig, ImagesRecord, resolve_data_config
from ospq_export.data.door import folder_of, image_set, open_source
from ospq_export.data.folders import scan_folder
from ospq_export.data.images import ImageSet
from ospq_export.data.loading import Batch
from ospq_export.data.streams import StreamSet

__all__ = [
    "Batch",
    "ClassChoice",
    "Classes",
    "DataConfig",
    "ImageSet",
    "ImagesRecord",
    "StreamSet",
    "folder_of",
    "image_set",
    "known_classes",
    "number_classes",
    "open_source",
    "resolve_data_config",
    "scan_folder",
]
