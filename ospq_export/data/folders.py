"""Finding images below a folder, and which of the folders are classes."""

import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ospq_export.data.class_map import class_name, natural_order
from ospq_export.data.config import ClassLevel
from ospq_export.data.pixels import picture_extensions
from ospq_export.errors import InputError

logger = logging.getLogger(__name__)

_HIDDEN_FOLDERS = {"#recycle", "@eadir", "__macosx", "__pycache__", "lost+found"}
_HIDDEN_BY_WINDOWS = {"$recycle.bin", "desktop.ini", "system volume information", "thumbs.db"}
_HIDDEN = _HIDDEN_FOLDERS | _HIDDEN_BY_WINDOWS
_CONTAINER = re.compile(
    r"data|files|frames|images?|imgs?|originals?|photos?|pics?|pictures?|raw|rgb|samples"
    r"|bmp|gif|jpe?gs?|jpegimages|pngs?|tiff?|webp"
)
_TRAINING = frozenset({"train", "training", "trainset"})
_HELD_OUT = frozenset({"dev", "eval", "test", "testing", "testset", "val", "valid", "validate", "validation"})
_SHOWN = 3


@dataclass(frozen=True)
class Scan:
    """What lies below a folder.

    Attributes:
        root: The folder.
        files: Paths of the images relative to it, with forward slashes, in timm's natural order.
        class_of: Each file's class; empty strings where there are no class folders.
        names: All classes, those without an image too; none where the images lie directly in the root.
        empty: Classes without an image.
        passed_over: Files and folders that are no images, by file name ending or name, and how many there are.
        class_from: Which folders were taken as classes.
        called: What a class name is here, in the plural.
    """

    root: Path
    files: Sequence[str]
    class_of: Sequence[str]
    names: Sequence[str]
    empty: Sequence[str] = ()
    passed_over: dict[str, int] = field(default_factory=dict)
    class_from: ClassLevel | None = None
    called: str = "class folders"


def scan_folder(root: Path, class_from: ClassLevel | None = None) -> Scan:
    """Finds the images below `root`, in class folders or all of them directly in it.

    Args:
        root: The folder.
        class_from: Whether the `first` level below the root or the whole `path` is an image's class. None takes the first level
            where there is no other reading, and refuses the rest.

    Raises:
        InputError: No such folder, one below it that cannot be read, no image, images both in and beside class folders, a folder
            of several splits, or folders in which classes could be meant in several ways.
    """
    walk = _Walk(root)
    walk.visit("", frozenset())
    return arrange(root, walk.pictures, walk.passed_over, class_from)


def arrange(
    root: Path, pictures: dict[str, list[str]], passed_over: Counter[str], class_from: ClassLevel | None
) -> Scan:
    """Finds the classes of images that lie in folders, and puts them into their order.

    Args:
        root: Where the folders are.
        pictures: Names of images by their folder's path relative to the root.
        passed_over: How many files and folders of a kind are no images.
        class_from: See `scan_folder`.

    Raises:
        InputError: See `scan_folder`.
    """
    pictured = sorted(folder for folder, files in pictures.items() if files)
    if not pictured:
        raise InputError(
            f"no images in this {kind_of(root)}{f', only {_listed(passed_over)}' if passed_over else ''}",
            where=root,
            fix="give one with images that Pillow opens, jpg, png, webp, tiff, bmp, ...",
        )
    if class_from is None:
        _refuse_splits(root, pictures)
    names: list[str] = []
    class_of_folder = {"": ""}
    if pictured == [""]:
        class_from = None
        passed_over.update(f"{name}/" for name in pictures if name and "/" not in name)
    else:
        class_of_folder, names, class_from = _classes(root, pictures, pictured, class_from)
    warn_passed_over(root, passed_over)
    paths = [f"{folder}/{file}" if folder else file for folder in pictured for file in pictures[folder]]
    files = natural_order(paths)
    class_of = [class_of_folder[file.rpartition("/")[0]] for file in files]
    held = set(class_of)
    return Scan(
        root,
        files,
        class_of,
        names,
        [name for name in names if name not in held],
        dict(sorted(passed_over.items())),
        class_from,
    )


def kind_of(root: Path) -> str:
    """What holds the folders."""
    return "folder" if root.is_dir() else "archive"


def warn_passed_over(root: Path | str, passed_over: Counter[str]) -> None:
    """Says what is no image."""
    if passed_over:
        logger.warning(
            "%s: passed over %d files or folders that are no images: %s",
            root,
            passed_over.total(),
            _listed(passed_over),
        )


class _Walk:
    """Folders below a root, each with the names of its images; what is passed over is counted.

    Attributes:
        pictures: Names of images by their folder's path relative to the root; every folder that is not hidden has an entry.
        passed_over: How many files and folders of a kind are none of these.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self.pictures: dict[str, list[str]] = {}
        self.passed_over: Counter[str] = Counter()

    def visit(self, folder: str, above: frozenset[tuple[int, int]]) -> None:
        """Looks into a folder and those below it; `above` are the devices and inodes of the folders around it."""
        path = self._root / folder
        try:
            status = path.stat()
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError as error:
            # Passed over in silence, as os.walk does, its class would vanish.
            raise InputError(
                f"cannot read this folder: {error.strerror}",
                where=error.filename,
                fix="give a folder of images",
            ) from error
        here = (status.st_dev, status.st_ino)
        if here in above:
            self.passed_over["symbolic link to a folder around it"] += 1
            logger.warning("passed over, it leads back to a folder around it: %s", path)
            return
        self.pictures[folder] = []
        for entry in entries:
            self._sort_in(entry, folder, above | {here})

    def _sort_in(self, entry: os.DirEntry[str], folder: str, above: frozenset[tuple[int, int]]) -> None:
        if is_hidden(entry.name):
            self.passed_over[_hidden_kind(entry)] += 1
        elif _is(entry, "dir"):
            self.visit(f"{folder}/{entry.name}" if folder else entry.name, above)
        elif not _is(entry, "file"):
            self.passed_over["broken link" if entry.is_symlink() else "no regular file"] += 1
        elif ending(entry.name) in picture_extensions():
            self.pictures[folder].append(entry.name)
        else:
            self.passed_over[ending(entry.name) or "no file name ending"] += 1


def _is(entry: os.DirEntry[str], kind: str) -> bool:
    try:
        return entry.is_dir() if kind == "dir" else entry.is_file()
    except OSError:
        # A link that leads to itself.
        return False


def ending(name: str) -> str:
    """A file name's ending in lower case, with the dot."""
    return PurePosixPath(name).suffix.lower()


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is passed over."""
    return name.startswith(".") or name.casefold() in _HIDDEN


def _hidden_kind(entry: os.DirEntry[str]) -> str:
    if _is(entry, "dir"):
        return f"{entry.name}/"
    if entry.name.startswith("._"):
        return "._*"
    return f".*{ending(entry.name)}" if ending(entry.name) in picture_extensions() else entry.name


def _classes(
    root: Path, folders: dict[str, list[str]], pictured: Sequence[str], class_from: ClassLevel | None
) -> tuple[dict[str, str], list[str], ClassLevel]:
    """The class of each folder with images, and all classes.

    Raises:
        InputError: Images lie beside class folders, the classes are ambiguous, or two folders have one name.
    """
    if "" in pictured:
        raise InputError(
            "images lie both in class folders and beside them", where=root, fix="move those beside away"
        )
    if class_from is None:
        _refuse_ambiguous(root, pictured)
    whole = class_from == "path"
    raw = [f for f in folders if f and (_is_class_path(f, folders) if whole else "/" not in f)]
    class_of = {f: class_name(_text(f if whole else f.partition("/")[0])) for f in pictured}
    names = Counter(class_name(_text(folder)) for folder in raw)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise InputError(
            f"two folders are called {twice[0]!r}, spelt with other code points",
            where=root,
            fix="join them, or rename one",
        )
    return class_of, list(names), class_from or "first"


def _is_class_path(folder: str, folders: dict[str, list[str]]) -> bool:
    """Whether a folder is a class where the whole path is: it holds images, or nothing at all."""
    return bool(folders[folder]) or not any(other.startswith(f"{folder}/") for other in folders)


def is_container(folders: str) -> bool:
    """Whether folders below a class are no classes themselves."""
    return all(_CONTAINER.fullmatch(part.casefold()) for part in folders.split("/"))


def _text(name: str) -> str:
    """A file name as text that can be written, whatever bytes it has."""
    return os.fsencode(name).decode("utf-8", "replace")


def _refuse_ambiguous(root: Path, pictured: Sequence[str]) -> None:
    """Takes `class/images/x` as it is meant, and nothing else below the first level."""
    below = [folder for folder in pictured if "/" in folder]
    strange = [f for f in below if not is_container(f.partition("/")[2])]
    if strange:
        raise InputError(
            f"the images lie below the first level, and their classes could be {strange[0].partition('/')[0]!r} or "
            f"{_text(strange[0])!r}, ...",
            where=f"{root}: {', '.join(map(_text, strange[:_SHOWN]))}",
            fix="say which with `class_from` first or `class_from` path, or give the folder that holds the classes",
        )
    if below:
        logger.warning(
            "%s: images lie in %s, ...: the first level below the root is the class",
            root,
            ", ".join(map(_text, below[:2])),
        )


def _refuse_splits(root: Path, folders: dict[str, list[str]]) -> None:
    top = [folder for folder in folders if folder and "/" not in folder]
    training = [name for name in top if name.casefold() in _TRAINING]
    held_out = [name for name in top if name.casefold() in _HELD_OUT]
    if (training and held_out) or len(held_out) > 1:
        splits = sorted(training + held_out)
        choices = " or ".join(f"`data` {root / name}" for name in splits)
        which = f"{choices} (or `class_from` first, if they are classes)"
        raise InputError(
            f"this {kind_of(root)} holds {' and '.join(f'{name}/' for name in splits)}: "
            "these are parts of a data set, not classes",
            where=root,
            fix=f"say which: {which}"
            if root.is_dir()
            else "give one of them, or `class_from` first, if they are classes",
        )


def _listed(passed_over: Counter[str]) -> str:
    shown = [f"{count} {name}" for name, count in passed_over.most_common(10)]
    return ", ".join(shown + ["..."] * (len(passed_over) > len(shown)))
