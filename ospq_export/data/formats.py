"""Which files are pictures: what Pillow opens, without documents, films and formats that need a program of their own."""

from functools import cache

from PIL import Image

_NOT_PICTURES = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF"})


@cache
def picture_extensions() -> frozenset[str]:
    """File name endings of pictures, in lower case with the dot."""
    return frozenset(
        extension
        for extension, name in Image.registered_extensions().items()
        if name in Image.OPEN and name not in _NOT_PICTURES
    )


@cache
def picture_formats() -> tuple[str, ...]:
    """Pillow's names of these formats, in the order in which it tries them; a file's name does not bind its content."""
    endings = picture_extensions()
    known = {name for ending, name in Image.registered_extensions().items() if ending in endings}
    return tuple(name for name in Image.ID if name in known)
