"""The keys of a recipe, as people read them: what each takes, and what is wrong with a value."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import tomli_w
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from ospq_export.errors import InputError, reason_of

# Too long a number and too deep a list are no TOMLDecodeError.
_UNREADABLE = (ValueError, RecursionError)
_UNION = (Union, UnionType)
_LIMITS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
_UNKNOWN_KEY, _PATTERN = "extra_forbidden", "string_pattern_mismatch"
_UNKNOWN_VALUE = ("literal_error", "union_tag_invalid", _PATTERN)


@dataclass(frozen=True)
class Key:
    """One key.

    Attributes:
        name: with its sections, "reconstruction.iterations".
        takes: what it takes, in words.
        default: as TOML would have it; "" where a recipe has to state it.
        description: what it does.
    """

    name: str
    takes: str
    default: str
    description: str


def keys_of(model: type[BaseModel], prefix: str = "") -> list[Key]:
    """All keys of a model, those of its sections with their names in front."""
    return list(_keys(model, prefix))


def _keys(model: type[BaseModel], prefix: str) -> Iterator[Key]:
    for field_name, field in model.model_fields.items():
        name = f"{prefix}{field_name}"
        sections = [part for part in _parts(field.annotation) if _is_model(part)]
        if len(sections) == 1 and not _kinds(sections[0]):
            yield from _keys(sections[0], f"{name}.")
            continue
        yield Key(name, _takes(field, sections), _default(field), field.description or "")
        # Kinds of one thing: their own settings lie below it.
        for section in sections:
            yield from (key for key in _keys(section, f"{name}.") if not key.name.endswith(".kind"))


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _parts(annotation: Any) -> list[Any]:
    """The members of a union; an annotation that is none is its only one."""
    if get_origin(annotation) is Annotated:
        return _parts(get_args(annotation)[0])
    if get_origin(annotation) in _UNION:
        return [part for member in get_args(annotation) for part in _parts(member)]
    return [annotation]


def _kinds(model: type[BaseModel]) -> tuple[str, ...]:
    field = model.model_fields.get("kind")
    return () if field is None else get_args(field.annotation)


def _takes(field: FieldInfo, sections: Sequence[type[BaseModel]]) -> str:
    if sections:
        return ", ".join(kind for section in sections for kind in _kinds(section))
    words = ", ".join(_word(part) for part in _parts(field.annotation) if part is not type(None))
    limits = [
        f"{word} {getattr(limit, name)}"
        for limit in field.metadata
        for name, word in _LIMITS.items()
        if hasattr(limit, name)
    ]
    return ", ".join([words, *limits])


def _word(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(map(str, get_args(kind)))
    origin = get_origin(kind) or kind
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        tuple: "a list",
        dict: "a table",
    }
    return names.get(origin, getattr(origin, "__name__", str(origin)))


def _default(field: FieldInfo) -> str:
    if field.is_required() or field.default in (None, "", {}):
        return ""
    return str(field.default).lower() if isinstance(field.default, bool) else str(field.default)


def as_toml(recipe: BaseModel) -> str:
    """A recipe with all its values as TOML; what is None is left out, which means the same."""
    return tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))


def refusal(
    model: type[BaseModel],
    error: ValidationError,
    where: str,
    *,
    kind: str = "recipe",
    listed_by: str = "recipe explain",
) -> InputError:
    """What is wrong with a recipe, or with another TOML file that a model describes, in one line.

    Args:
        model: of the recipe.
        error: what it raised.
        where: the recipe's name or file.
        kind: what messages call it.
        listed_by: where all keys are listed.
    """
    found = error.errors()
    # A key that is misspelt explains the one that is missing.
    first = next((e for e in found if e["type"] == _UNKNOWN_KEY), found[0])
    known = {key.name: key for key in keys_of(model)}
    name, rest = _name([str(part) for part in first["loc"]], known)
    if first["type"] == _UNKNOWN_KEY and not rest:
        of = str(first["loc"][-2])
        return InputError(f"{name} is no setting of the kind {of!r}", where=where, fix="leave it out")
    if first["type"] == _UNKNOWN_KEY:
        unknown = ".".join(filter(None, (name, rest[-1])))
        return InputError(
            f"unknown {kind} key {unknown!r}", where=where, fix=nearest(unknown, known, listed_by)
        )
    if not name:
        message = first["msg"].removeprefix("Value error, ")
        return InputError(message, where=where, fix=f"add it to the {kind}")
    if name not in known:
        return InputError(
            f"{name} is a section of a {kind}", where=where, fix=f"set a key of it, as {name}.KEY"
        )
    # Behind a key of several types, pydantic says which one it tried.
    takes = known[name].description if rest else known[name].takes
    if first["type"] == "missing":
        return InputError(f"the {kind} lacks {name}", where=where, fix=f"give it {takes}")
    value = first["input"].get("kind", first["input"]) if isinstance(first["input"], dict) else first["input"]
    what = "is unknown" if first["type"] in _UNKNOWN_VALUE else "is not possible"
    return InputError(f"{name} {value!r} {what}", where=where, fix=f"it takes {takes}")


def _name(path: Sequence[str], known: dict[str, Key]) -> tuple[str, list[str]]:
    """The key or section that a path leads to, without what is none: the members of unions, and what nobody knows."""
    name, rest = "", list[str]()
    for part in path:
        candidate = f"{name}.{part}" if name else part
        if any(key == candidate or key.startswith(f"{candidate}.") for key in known):
            name, rest = candidate, []
        else:
            rest.append(part)
    return name, rest


def nearest(name: str, known: Collection[str], listed_by: str = "recipe explain") -> str:
    """The keys that may be meant: of the same last word, else those spelt alike, else where all of them are listed."""
    last = name.rsplit(".", 1)[-1]
    found = [key for key in known if key.rsplit(".", 1)[-1] == last]
    if not found:
        by_last = {key.rsplit(".", 1)[-1]: key for key in known}
        by_last |= {key.split(".", 1)[0]: key.split(".", 1)[0] for key in known}
        found = [by_last[word] for word in difflib.get_close_matches(last, by_last, 1, 0.7)]
    return f"write {' or '.join(found)}" if found else f"{listed_by} lists the keys"


def read_toml(path: Path, kind: str = "recipe") -> dict[str, Any]:
    """What a TOML file says.

    Raises:
        InputError: it cannot be read, or is not TOML.
    """
    try:
        # Some editors put a byte order mark in front.
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the {kind} cannot be read: {reason_of(error)}", where=path) from error
    return parse_toml(text, path, kind)


def parse_toml(text: str, where: object, kind: str = "recipe") -> dict[str, Any]:
    """What a text of TOML says.

    Raises:
        InputError: it is not TOML.
    """
    try:
        return tomllib.loads(text)
    except _UNREADABLE as error:
        raise InputError(f"the {kind} is not valid TOML: {error}", where=where) from error


def override(values: dict[str, Any], text: str, kind: str = "recipe") -> None:
    """Set one value of a TOML file that was read: "key=value" or "section.key=value", a TOML literal or a bare word.

    Raises:
        InputError: it is not of that form, or leads through something that is no section.
    """
    key, separator, literal = text.partition("=")
    if not separator or not key.strip():
        raise InputError(f"override {text!r} is not of the form key=value", where="`overrides`")
    *sections, last = key.strip().split(".")
    target = values
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise InputError(f"{section!r} is not a section of a {kind}", where=f"`overrides` {text}")
    value = _literal(literal.strip())
    # A bare word in the place of a table of some kind is another kind, with its defaults.
    target[last] = {"kind": value} if isinstance(target.get(last), dict) and isinstance(value, str) else value


def _literal(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except _UNREADABLE:
        return text
