"""Tar files that can only be read from front to back: pipes, and compressed ones."""

from __future__ import annotations

import lzma
import sys
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import BinaryIO

from ospq_export.data.choice import ClassChoice
from ospq_export.data.class_map import class_name
from ospq_export.data.config import ClassLevel
from ospq_export.data.folders import ending, is_container
from ospq_export.data.found import text_of
from ospq_export.data.sources import Record
from ospq_export.data.tar import SIDECARS, Header, broken, key_of, kind_of, members, read_label, relative
from ospq_export.errors import InputError

STANDARD_INPUT = "-"
ENDINGS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")


def stream_tar(where: str, choice: ClassChoice) -> Iterator[Record]:
    """The images of a tar file as they come, with the labels beside them, and else the folder's name.

    The files of one sample follow each other, as WebDataset writes them.

    Args:
        where: A file, a FIFO, or `-` for standard input.
        choice: Which folders are the classes.

    Raises:
        InputError: It cannot be read to its end, an image's class is ambiguous, or two images share a label.
    """
    try:
        # Another process may wait at the other end of a FIFO, so it is opened here and no sooner.
        with _opened(where) as file, tarfile.open(fileobj=file, mode="r|*", tarinfo=Header) as archive:
            yield from _samples(archive, where, choice.level)
    except (ValueError, tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise broken(error, where) from error


def _opened(where: str) -> AbstractContextManager[BinaryIO]:
    return nullcontext(sys.stdin.buffer) if where == STANDARD_INPUT else Path(where).open("rb")


def _samples(archive: tarfile.TarFile, where: str, level: ClassLevel | None) -> Iterator[Record]:
    sample = _Sample("")
    for member in members(archive):
        name = relative(member.name)
        if member.isdir() or kind_of(member, name) is not None:
            continue
        if key_of(name) != sample.key:
            yield from sample.records(where, level)
            sample = _Sample(key_of(name))
        if ending(name) in SIDECARS:
            sample.add_label(read_label(archive, member, where), ending(name))
        else:
            file = archive.extractfile(member)
            sample.pictures.append((name, b"" if file is None else file.read()))
    yield from sample.records(where, level)


class _Sample:
    """Files with one key.

    Attributes:
        key: What their names have in common.
        pictures: Names and contents.
        label: What lies beside them.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self.pictures: list[tuple[str, bytes]] = []
        self.label: str | int | None = None
        self._source = ""

    def add_label(self, label: str | int | None, source: str) -> None:
        """Takes a label; one of its own file wins over one in JSON."""
        if label not in (None, "") and (source == ".cls" or not self._source):
            self.label, self._source = label, source

    def records(self, where: str, level: ClassLevel | None) -> Iterator[Record]:
        """An image, or several without labels beside them."""
        if self.label is not None and len(self.pictures) > 1:
            names = " and ".join(text_of(name) for name, _ in self.pictures[:2])
            raise InputError(f"{names} share a label", where=where, fix="leave one picture per sample")
        for name, content in self.pictures:
            if self.label is not None:
                yield Record(text_of(name), content, self.label)
            else:
                folder = class_of_path(text_of(name.rpartition("/")[0]), where, level)
                yield Record(text_of(name), content, folder, by_name=True)


def class_of_path(folder: str, where: object, class_from: ClassLevel | None) -> str | None:
    """The class of a single image by the folder it lies in; None where it lies in none.

    Raises:
        InputError: Nothing tells which part of the path is the class.
    """
    first, _, below = folder.partition("/")
    if class_from is None and below and not is_container(below):
        raise InputError(
            f"a class could be {first!r} or {folder!r}",
            where=where,
            fix="say which with `class_from` first or `class_from` path",
        )
    return class_name(folder if class_from == "path" else first) or None
