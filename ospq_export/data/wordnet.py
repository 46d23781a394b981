"""WordNet ids as class folders: a network's outputs are numbered by the table it was trained with, not by the folders."""

import re
from collections.abc import Sequence
from importlib.resources import files

# timm has the table of this subset's heads but no name for it.
_UNNAMED = {10450: ("imagenet-21k-miil-w21", "imagenet21k_miil_w21_synsets.txt")}


def is_wordnet_id(name: str) -> bool:
    """Whether a name looks like n01440764."""
    return re.fullmatch(r"n[0-9]{8}", name) is not None


def wordnet_table(outputs: int) -> tuple[str, Sequence[str]] | None:
    """The table, in timm, of the ImageNet subset with as many classes as the network has outputs.

    Returns:
        The subset's name and the WordNet ids in the order of the outputs; None where timm knows no such subset.
    """
    from timm.data import ImageNetInfo, infer_imagenet_subset

    if outputs in _UNNAMED:
        name, file = _UNNAMED[outputs]
        return name, (files("timm.data") / "_info" / file).read_text().split()
    subset = infer_imagenet_subset({"num_classes": outputs})
    return None if subset is None else (subset, ImageNetInfo(subset).label_names())
