"""Which output of a network each class folder stands for; where nothing tells, the answer is refused, never guessed."""

import logging
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from ospq_export.data.choice import ClassChoice, Classes, Classified, ClassOrder
from ospq_export.data.class_map import (
    is_wordnet_id,
    natural_order,
    natural_ties,
    read_class_map,
    wordnet_table,
)
from ospq_export.errors import InputError

logger = logging.getLogger(__name__)

_SHOWN = 6
_WAYS = (
    "give `class_map` FILE (one name a line), or `class_order` plain or natural, as the network was trained"
)
_AGREE = "folders, plain and natural order agree"


def number_classes(
    scan: Classified, choice: ClassChoice, outputs: int | None, *, needed: bool = True
) -> Classes:
    """Finds the classes' numbers: the given map or order, timm's table of WordNet ids, or the order both libraries agree on.

    Args:
        scan: The images' class names.
        choice: What the user says.
        outputs: Outputs of the network; None where they are not known, and then as many as there are names.
        needed: Whether labels are needed. If not, folders that are not as many as the outputs are left without numbers.

    Raises:
        InputError: The map does not fit the network or the folders, or nothing tells the numbers.
    """
    if not scan.names:
        if choice.map_file is not None:
            read_class_map(choice.map_file)
        logger.warning("%s: no labels: the images have no %s", scan.root, scan.called)
        return Classes()
    # One output tells two classes apart, by its sign.
    classes = len(scan.names) if outputs is None else max(outputs, 2)
    if choice.map_file is not None:
        found = from_map(choice.map_file, outputs and classes)
    else:
        found = _from_table(scan, choice, outputs) or _from_order(scan, choice, classes, needed)
    if found.indices:
        check_folders(scan, found)
        _name_missing(scan, found)
    return found


def known_classes(scan: Classified, choice: ClassChoice, known: Classes) -> Classes:
    """The classes that a run knows, held against what the user says and the names that are there.

    Args:
        scan: The images' class names.
        choice: What the user says; it has to agree. Where an earlier version numbered the run's classes and guessed, it wins.
        known: The run's classes.

    Raises:
        InputError: The two contradict each other, or a folder is none of the run's classes.
    """
    if not scan.names:
        logger.warning("%s: no labels: the images have no %s", scan.root, scan.called)
        return Classes()
    known = agreed(choice, known)
    check_folders(scan, known)
    _name_missing(scan, known)
    return known


def agreed(choice: ClassChoice, known: Classes) -> Classes:
    """The classes that a run knows, held against what the user says.

    Raises:
        InputError: The two contradict each other.
    """
    guessed = known.source is None and _was_guessed(known.indices)
    said = _said(choice, known)
    if said is not None and dict(said.indices) != dict(known.indices):
        difference = _first_difference(known.indices, said.indices)
        if not guessed:
            raise InputError(
                f"the run has other classes than {said.source}: {difference}",
                where=known.source or "the manifest",
                fix="leave the option out, or calibrate again with it",
            )
        logger.warning("the run's classes were numbered by a guess; %s is used: %s", said.source, difference)
        known = said
    elif guessed and said is None:
        logger.warning(
            "the run's classes were numbered in natural order by an earlier version, which did not ask: "
            "if the network was trained in plain order, give `class_order` plain"
        )
    return known


def check_folders(scan: Classified, classes: Classes) -> None:
    """Holds the folders to the classes.

    Raises:
        InputError: One is not among them.
    """
    strangers = [name for name in scan.names if name not in classes.indices]
    if not strangers:
        return
    folded = {_folded(name): name for name in classes.indices}
    close = [folded[_folded(name)] for name in strangers if _folded(name) in folded]
    raise InputError(
        f"{len(strangers)} {scan.called} are not among the run's {len(classes.indices)} classes"
        f" ({classes.source or 'by the manifest'})",
        where=f"{scan.root}: {', '.join(strangers[:_SHOWN])}",
        fix=f"a class is called {close[0]!r}" if close else "rename or remove them, or give their class map",
    )


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold().strip()


def from_map(path: Path, classes: int | None) -> Classes:
    """The classes that a file says; `classes` is how many the network has, None where that is not known.

    Raises:
        InputError: It cannot be read, or has another number of classes.
    """
    indices = read_class_map(path)
    if classes is not None and len(indices) != classes:
        names = sorted(indices, key=indices.__getitem__)
        detail = (
            f"surplus: {', '.join(names[classes:][:_SHOWN])}"
            if len(names) > classes
            else f"its last is {names[-1]!r}, and index {len(names)} is missing"
        )
        raise InputError(
            f"the class map has {len(names)} classes and the network {classes}: {detail}",
            where=f"`class_map` {path}",
            fix="give one name for each output of the network",
        )
    return Classes(indices, f"class_map={path}")


def _from_table(scan: Classified, choice: ClassChoice, outputs: int | None) -> Classes | None:
    if choice.order is not None or not all(map(is_wordnet_id, scan.names)):
        return None
    table = None if outputs is None else wordnet_table(outputs)
    if table is None:
        return None
    name, ids = table
    logger.warning("%s: %d WordNet ids are numbered by timm's table %s", scan.root, len(scan.names), name)
    return Classes(_numbered(ids), f"timm's table {name}")


def _from_order(scan: Classified, choice: ClassChoice, classes: int, needed: bool) -> Classes:
    if len(scan.names) != classes:
        what = f"{len(scan.names)} {scan.called} and {classes} classes of the network{_odd_ones(scan)}"
        if needed:
            raise InputError(
                f"{what}: nothing tells which is which",
                where=scan.root,
                fix="give `class_map` FILE, which names every class of the network",
            )
        logger.warning("%s: %s: the run keeps no class names", scan.root, what)
        return Classes()
    if choice.order is not None:
        ties = natural_ties(scan.names)
        if choice.order == "natural" and ties:
            raise InputError(
                f"natural order does not tell {ties[0]!r} from {ties[1]!r}",
                where=scan.root,
                fix="give `class_map` FILE, or `class_order` plain",
            )
        return _in_order(scan.names, choice.order)
    _refuse_other_orders(scan)
    return Classes(_numbered(sorted(scan.names)), _AGREE)


def _odd_ones(scan: Classified) -> str:
    """What may explain a wrong number of folders."""
    strange = [name for name in scan.names if not is_wordnet_id(name)]
    if strange and len(strange) < len(scan.names) / 2:
        return f"; no WordNet ids: {', '.join(strange[:_SHOWN])}"
    return f"; without an image: {', '.join(scan.empty[:_SHOWN])}" if scan.empty else ""


def _in_order(names: Sequence[str], order: ClassOrder) -> Classes:
    ordered = natural_order(names) if order == "natural" else sorted(names)
    return Classes(_numbered(ordered), f"class_order={order}")


def _refuse_other_orders(scan: Classified) -> None:
    plain, natural, ties = sorted(scan.names), natural_order(scan.names), natural_ties(scan.names)
    # Plain order as a machine sees it that stores letters and their accents apart.
    decomposed = sorted(scan.names, key=lambda name: unicodedata.normalize("NFD", name))
    if plain == natural == decomposed and not ties:
        return
    reason = ""
    if plain == natural and ties:
        reason = f" (and natural order does not tell {ties[0]!r} from {ties[1]!r})"
    elif plain == natural:
        natural, reason = decomposed, " (where letters and accents are stored apart)"
    differing = (place for place, name in enumerate(plain) if name != natural[place])
    start = 0 if len(plain) <= 2 * _SHOWN or reason else next(differing)
    raise InputError(
        f"the {scan.called} have two orders{reason}: plain (torchvision) {_excerpt(plain, start)}; "
        f"natural (timm) {_excerpt(natural, start)}",
        where=scan.root,
        fix=_WAYS,
    )


def _excerpt(names: Sequence[str], start: int) -> str:
    stop = start + 2 * _SHOWN if not start else start + _SHOWN
    shown = [*["..."] * (start > 0), *names[start:stop], *["..."] * (stop < len(names))]
    return ", ".join(shown)


def _numbered(names: Sequence[str]) -> dict[str, int]:
    return {name: index for index, name in enumerate(names)}


def _name_missing(scan: Classified, classes: Classes) -> None:
    there = set(scan.names)
    missing = [name for name in classes.indices if name not in there]
    if missing or scan.empty:
        logger.warning(
            "%s: %d of %d classes have no %s, %d have one without an image%s",
            scan.root,
            len(missing),
            len(classes.indices),
            scan.called.removeprefix("class ").removesuffix("s"),
            len(scan.empty),
            f": {', '.join([*missing, *scan.empty][:_SHOWN])}",
        )


def _was_guessed(indices: Mapping[str, int]) -> bool:
    """Whether a class map without a source is what the natural order gives, and plain order another one."""
    names = sorted(indices, key=indices.__getitem__)
    return names == natural_order(names) != sorted(names)


def _said(choice: ClassChoice, known: Classes) -> Classes | None:
    """The run's classes as the user's options number them."""
    if choice.map_file is not None:
        return from_map(choice.map_file, None)
    return None if choice.order is None else _in_order(list(known.indices), choice.order)


def _first_difference(ours: Mapping[str, int], theirs: Mapping[str, int]) -> str:
    for name, index in sorted(ours.items(), key=lambda item: item[1]):
        if theirs.get(name) != index:
            there = f"{theirs[name]} there" if name in theirs else "missing there"
            return f"class {name!r} is {index} in the run and {there}"
    surplus = next(name for name in theirs if name not in ours)
    return f"class {surplus!r} is not in the run"
