"""Which name belongs to which output: class maps from files, WordNet ids, and the orders that names are numbered in."""

from __future__ import annotations

import codecs
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

from ospq_export.errors import InputError, reason_of

# timm has the table of this subset's heads but no name for it.
_UNNAMED = {10450: ("imagenet-21k-miil-w21", "imagenet21k_miil_w21_synsets.txt")}
_FORMS = "one name a line, 'index,name', 'name,index' or 'index name' lines, or JSON"
_HEADING = re.compile(r"class(_(id|idx|index|name))?|folder|id|idx|index|label|name|synset|target|wnid")
_SHOWN = 3
_BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
Pairs = list[tuple[str, int]]


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


def natural_key(name: str) -> list[int | str]:
    """A name's key in timm's order: digits by value, letters without case; unlike timm's own it takes digits such as '²' too."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())]


def class_name(raw: str) -> str:
    """A folder's or a file's name as a class name: machines differ in how they compose letters (NFC, NFD)."""
    return unicodedata.normalize("NFC", raw)


def natural_order(names: Sequence[str]) -> list[str]:
    """Sorted as timm numbers classes; names that timm's key does not tell apart are in plain order."""
    return sorted(names, key=lambda name: (natural_key(name), name))


def natural_ties(names: Sequence[str]) -> list[str]:
    """The first two names that timm's order does not tell apart, such as '1' and '01'; nothing where there are none."""
    pairs = pairwise(natural_order(names))
    return next((list(pair) for pair in pairs if natural_key(pair[0]) == natural_key(pair[1])), [])


def read_class_map(path: Path) -> dict[str, int]:
    """Reads a class map.

    Args:
        path: JSON (a list of names, an object of indices by name or of names by index), or text: one name a line, or lines of
            `index,name`, `name,index`, `index name` or `name index`.

    Returns:
        Indices 0 to N - 1 by name.

    Raises:
        InputError: It cannot be read, is none of these, names a class or an index twice, or leaves an index out.
    """
    text = _read(path)
    stripped = text.lstrip()
    is_json = path.suffix.lower() == ".json" or stripped[:1] in ("[", "{")
    pairs = _from_json(stripped, path) if is_json else _from_lines(text, path)
    return _checked([(class_name(name.strip()), index) for name, index in pairs], path)


def _refuse(what: str, path: Path, fix: str = f"write {_FORMS}") -> InputError:
    return InputError(f"the class map {what}", where=f"`class_map` {path}", fix=fix)


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _refuse(f"cannot be read: {error.strerror}", path, "give a file") from error
    encoding = next((name for bom, name in _BOMS if data.startswith(bom)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise _refuse("is not UTF-8 text", path, "save it as UTF-8") from error


def _from_json(text: str, path: Path) -> Pairs:
    def pairs_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = _twice([key for key, _ in pairs])
        if twice:
            raise _refuse(f"has {twice[0]!r} twice", path, "leave one out")
        return dict(pairs)

    try:
        value = json.loads(text, object_pairs_hook=pairs_of)
    except (ValueError, RecursionError) as error:
        raise _refuse(f"is not JSON: {reason_of(error)}", path) from error
    if isinstance(value, list) and value and all(isinstance(name, str) for name in value):
        return _numbered(value)
    if not isinstance(value, dict) or not value:
        raise _refuse("is neither a list of names nor an object", path)
    # Not isinstance: true and false are no indices.
    if all(type(index) is int for index in value.values()):
        return list(value.items())
    strange = [v for v in value.values() if not isinstance(v, str)]
    if strange:
        raise _refuse(f"has the value {str(strange[0])[:40]!r}, neither a name nor an index", path)
    return _by_index_or_name(list(value.items()), path)


def _by_index_or_name(rows: Sequence[tuple[str, str]], path: Path) -> Pairs:
    """Pairs of two columns, one of which holds the indices."""
    readings = [
        [(name, int(index)) for name, index in columns]
        for columns in (_swapped(rows), rows)
        if all(re.fullmatch(r"\s*[0-9]+\s*", index) for _, index in columns)
    ]
    if not readings:
        raise _refuse("has indices in neither column", path)
    complete = (r for r in readings if sorted(index for _, index in r) == list(range(len(r))))
    whole = list(complete) or readings[:1]
    if len(whole) > 1 and dict(whole[0]) != dict(whole[1]):
        raise _refuse("has numbers on both sides, and either could be the index", path, "write a JSON list")
    return whole[0]


def _from_lines(text: str, path: Path) -> Pairs:
    lines = [line.strip() for line in re.split(r"\r\n|\n|\r", text.rstrip())]
    if lines == [""]:
        raise _refuse("is empty", path)
    if "" in lines:
        raise _refuse(f"has an empty line {lines.index('') + 1}", path, "leave it out, or name the class")
    return _split_separated(lines, path) or _split_spaced(lines) or _numbered(map(_unquoted, lines))


def _split_separated(lines: list[str], path: Path) -> Pairs | None:
    """`index,name` or `name,index` lines; also with tabs or semicolons, and with a heading."""
    first = [_unquoted(part).casefold() for part in re.split(r"[,;\t]", lines[0])]
    body = lines[1:] if len(first) > 1 and all(map(_HEADING.fullmatch, first)) and len(lines) > 1 else lines
    before = _matches(r"([0-9]+)\s*[,;\t]\s*(.+)", body)
    found = before or _matches(r"(.+?)\s*[,;\t]\s*([0-9]+)", body)
    return _by_index_or_name(found, path) if found else None


def _split_spaced(lines: list[str]) -> Pairs | None:
    """`index name` or `name index` lines."""
    before = _matches(r"([0-9]+)\s+(.+)", lines)
    columns = _swapped(before) if before else _matches(r"(.+?)\s+([0-9]+)", lines) or []
    pairs = [(name, int(index)) for name, index in columns]
    # 'class 1', 'class 2' are names with a number in them.
    return None if _twice([index if before else name for name, index in pairs]) else pairs


def _matches(pattern: str, lines: list[str]) -> list[tuple[str, str]] | None:
    found = [re.fullmatch(pattern, line) for line in lines]
    pairs = [(_unquoted(match[1]), _unquoted(match[2])) for match in found if match]
    return pairs if len(pairs) == len(lines) else None


def _unquoted(text: str) -> str:
    text = text.strip()
    quoted = len(text) > 1 and text[0] == text[-1] == '"'
    return text[1:-1].replace('""', '"') if quoted else text


def _swapped(rows: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(right, left) for left, right in rows]


def _numbered(names: Iterable[str]) -> Pairs:
    return [(name, index) for index, name in enumerate(names)]


def _checked(pairs: Pairs, path: Path) -> dict[str, int]:
    twice = _twice([name for name, _ in pairs])
    if twice:
        raise _refuse(f"has the class {twice[0]!r} twice", path, "leave one out")
    if not all(name for name, _ in pairs):
        raise _refuse("has a class without a name", path, "name it")
    shared = _twice([index for _, index in pairs])
    if shared:
        names = [name for name, index in pairs if index == shared[0]]
        raise _refuse(f"gives index {shared[0]} to {names[0]!r} and {names[1]!r}", path, "give each its own")
    missing = sorted(set(range(len(pairs))) - {index for _, index in pairs})
    if missing:
        surplus = [f"{name!r} ({index})" for name, index in pairs if not 0 <= index < len(pairs)]
        raise _refuse(
            f"has {len(pairs)} classes and no index {', '.join(map(str, missing[:_SHOWN]))}, but "
            f"{', '.join(surplus[:_SHOWN])}",
            path,
            f"number them from 0 to {len(pairs) - 1} without a gap",
        )
    return dict(pairs)


def _twice(values: Sequence[Any]) -> list[Any]:
    return [value for value, count in Counter(values).items() if count > 1]
