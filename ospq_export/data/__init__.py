"""Images on their way into a network: the preprocessing, where images come from, and batches of tensors."""

from ospq_export.data.config import DataConfig, resolve_data_config
from ospq_export.data.images import Batch, ImageSet

__all__ = ["Batch", "DataConfig", "ImageSet", "resolve_data_config"]
