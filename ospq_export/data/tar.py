"""Images in tar files, found by their headers; an image is read by its offset.

timm's readers are not used: its tar reader ends at a damaged header without a word and keeps a pickled index beside the file, and
its WebDataset reader streams, with neither names nor a length.
"""

from __future__ import annotations

import dataclasses
import io
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ospq_export.data.choice import ClassChoice
from ospq_export.data.folders import arrange, ending, is_hidden, warn_passed_over
from ospq_export.data.found import (
    Found,
    Labels,
    found_in,
    label_in_json,
    natural_places,
    read_labels,
    refuse_twice,
    text_of,
)
from ospq_export.data.pixels import picture_extensions, read_picture
from ospq_export.errors import InputError

SIDECARS = (".cls", ".json")
_FIX = "copy it again, or leave it out"


class Header(tarfile.TarInfo):
    """A member's header.

    tarfile itself takes an early end of the file, and a damaged header, for the end of the archive; here they are errors.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str | None, errors: str) -> Self:
        """A header from 512 bytes.

        Raises:
            ValueError: There are fewer, or they are none.
        """
        if len(buf) < tarfile.BLOCKSIZE:
            raise ValueError("it ends early: the archive has no end mark")
        try:
            return super().frombuf(buf, encoding, errors)  # type: ignore[arg-type]
        except tarfile.HeaderError as error:
            if not any(buf):
                raise
            raise ValueError(f"it is damaged, or no tar file: {error}") from error


def members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The headers of an open archive, of which none is kept.

    Raises:
        ValueError: It ends early or is damaged.
        tarfile.TarError: It ends early, is damaged, or is no tar file.
        OSError: It cannot be read.
    """
    while (member := archive.next()) is not None:
        # tarfile keeps them all.
        archive.members.clear()  # type: ignore[attr-defined]
        yield member


def broken(error: Exception, where: object) -> InputError:
    """The error of an archive that cannot be read to its end."""
    what = "it ends early" if "unexpected end" in str(error) else str(error)
    return InputError(f"this tar file cannot be used: {what}", where=where, fix=_FIX)


@dataclass(frozen=True)
class TarSource:
    """Members of tar files, read by their offsets; the index is all that is kept, and no file stays open.

    Attributes:
        shards: The files.
        shard: int32, (N,), places in `shards`.
        offset: int64, (N,), bytes.
        size: int64, (N,), bytes.
        labels: int64, (N,).
        ids: N names.
    """

    shards: Sequence[Path]
    shard: NDArray[np.int32]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    labels: Labels
    ids: Sequence[str]

    def decode(self, index: int, mode: str, exif: bool) -> tuple[Image.Image, tuple[str, ...]]:
        """Image `index` in PIL mode `mode`, and notes on it; see `read_picture`."""
        with self.shards[self.shard[index]].open("rb") as file:
            file.seek(int(self.offset[index]))
            content = file.read(int(self.size[index]))
        return read_picture(io.BytesIO(content), mode, exif=exif)


@dataclass
class Index:
    """What the headers of all shards say.

    Attributes:
        names: Names of the images, relative.
        places: Shard, offset and size of each.
        sidecars: Labels by shard and key, of files beside the images.
        folders: All folders that are not hidden.
        passed_over: What is no image.
    """

    names: list[str] = field(default_factory=list)
    places: list[tuple[int, int, int]] = field(default_factory=list)
    sidecars: dict[tuple[int, str], Any] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    passed_over: Counter[str] = field(default_factory=Counter)

    def read(self, place: int, path: Path) -> None:
        """Adds a shard.

        Raises:
            InputError: It cannot be read to its end.
        """
        try:
            with tarfile.open(path, "r:", tarinfo=Header) as archive:
                for member in members(archive):
                    self._add(archive, member, place, path)
        except (ValueError, tarfile.TarError, EOFError, OSError) as error:
            raise broken(error, path) from error

    def _add(self, archive: tarfile.TarFile, member: tarfile.TarInfo, shard: int, path: Path) -> None:
        name = relative(member.name)
        kind = kind_of(member, name)
        if not any(map(is_hidden, name.split("/"))):
            # A folder of other files is a class without an image, as on a disk.
            self.folders.update(above(name if member.isdir() else name.rpartition("/")[0]))
        if kind is not None:
            self.passed_over[kind] += 1
        elif ending(name) in SIDECARS:
            self._add_label(read_label(archive, member, path), name, shard)
        elif not member.isdir():
            self.names.append(name)
            self.places.append((shard, member.offset_data, member.size))

    def _add_label(self, label: Any, name: str, shard: int) -> None:
        key = (shard, key_of(name))
        if label in (None, ""):
            self.passed_over[f"{ending(name)} without a label"] += 1
        elif ending(name) == ".cls" or key not in self.sidecars:
            self.sidecars[key] = label

    def source(
        self, paths: Sequence[Path], order: Sequence[int], ids: Sequence[str]
    ) -> Callable[[Labels], TarSource]:
        """What reads the images, in this order, once their labels are known."""
        places = np.array(self.places, np.int64).reshape(-1, 3)[order]
        shard, offset, size = places[:, 0].astype(np.int32), places[:, 1].copy(), places[:, 2].copy()
        return lambda labels: TarSource(paths, shard, offset, size, labels, ids)


def relative(name: str) -> str:
    """A member's name without leading slashes and dots, as a path below a folder has it."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def key_of(name: str) -> str:
    """What the files of one WebDataset sample have in common: all up to the first dot of the file name."""
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.partition('.')[0]}"


def above(folder: str) -> list[str]:
    """A folder and those around it."""
    parts = folder.split("/") if folder else []
    return ["/".join(parts[: depth + 1]) for depth in range(len(parts))]


def kind_of(member: tarfile.TarInfo, name: str) -> str | None:
    """What is passed over, in the words in which it is counted; None for images, labels and folders."""
    hidden = [part for part in name.split("/") if is_hidden(part)]
    if hidden:
        return hidden[0] if hidden[0] == name.rpartition("/")[2] and not member.isdir() else f"{hidden[0]}/"
    if member.isdir():
        return None
    if not member.isreg() or member.issparse():
        return "no regular file"
    known = ending(name) in picture_extensions() or ending(name) in SIDECARS
    return None if known else ending(name) or "no file name ending"


def read_label(archive: tarfile.TarFile, member: tarfile.TarInfo, where: object) -> Any:
    """The label in a file beside an image; None in a JSON file that has none.

    Raises:
        InputError: It is no text.
    """
    file = archive.extractfile(member)
    content = b"" if file is None else file.read()
    if ending(member.name) == ".json":
        return label_in_json(content)
    try:
        return content.decode().strip()
    except UnicodeDecodeError as error:
        raise InputError(
            f"the label {text_of(member.name)} is not UTF-8 text",
            where=where,
            fix="write a class name or number",
        ) from error


def open_shards(paths: Sequence[Path], root: Path, choice: ClassChoice) -> Found:
    """The images in tar files.

    Args:
        paths: The files.
        root: What they are called together in messages.
        choice: Which folders are the classes, where no labels lie beside the images.

    Raises:
        InputError: A file cannot be read to its end, there is no image, two have one name, or see `arrange` and `read_labels`.
    """
    index = Index()
    for place, path in enumerate(paths):
        index.read(place, path)
    if not index.sidecars:
        return _in_folders(index, paths, root, choice)
    labels = [
        index.sidecars.get((shard, key_of(n)))
        for n, (shard, _, _) in zip(index.names, index.places, strict=True)
    ]
    names = index.names
    if len(set(names)) < len(names):
        # Shards often count from zero, each for itself.
        names = [f"{paths[shard].stem}/{n}" for n, (shard, _, _) in zip(names, index.places, strict=True)]
    _refuse_several(names, root)
    warn_passed_over(root, index.passed_over)
    order = natural_places(names)
    return Found(
        root,
        ids := [text_of(names[place]) for place in order],
        index.source(paths, order, ids),
        read_labels([labels[place] for place in order], root),
        passed_over=dict(sorted(index.passed_over.items())),
    )


def _refuse_several(names: Sequence[str], root: Path) -> None:
    refuse_twice(names, root)
    keys = Counter(map(key_of, names))
    several = [name for name in names if keys[key_of(name)] > 1]
    if several:
        raise InputError(
            f"{len(several)} images share a label with another, such as {text_of(several[0])} and {text_of(several[1])}",
            where=root,
            fix="leave one picture per sample",
        )


def _in_folders(index: Index, paths: Sequence[Path], root: Path, choice: ClassChoice) -> Found:
    refuse_twice(index.names, root)
    pictures: dict[str, list[str]] = {folder: [] for folder in ("", *sorted(index.folders))}
    for name in index.names:
        folder, _, file = name.rpartition("/")
        pictures[folder].append(file)
    found = found_in(arrange(root, pictures, index.passed_over, choice.level))
    return dataclasses.replace(found, source=index.source(paths, natural_places(index.names), found.ids))
