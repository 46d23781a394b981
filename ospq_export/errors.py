"""The exceptions that are no faults of the program: the input was bad, or a budget cannot be kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class InputError(Exception):
    """Something the user gave cannot be used; the command line prints it as one line and exits with status 2.

    A setting is named as Python calls it, in backquotes, `batch_size`; the command line puts its option in that place.

    Args:
        what: What is wrong, as a clause.
        where: The file, option or name it was found in.
        fix: What to do about it.
    """

    def __init__(self, what: str, *, where: object = None, fix: str = "") -> None:
        line = what if where is None else f"{what} ({where})"
        super().__init__(" ".join(f"{line}: {fix}".split()) if fix else " ".join(line.split()))


class BudgetError(Exception):
    """No formats were found that keep a budget; the command line prints it as one line and exits with status 1."""


def damaged(what: str, where: object) -> InputError:
    """The error of a run directory that is damaged or was changed."""
    return InputError(what, where=where, fix="calibrate again, or copy the run directory anew")


def reason_of(error: BaseException) -> str:
    """The first line of what an exception says, without error numbers; its type where it says nothing."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


_PLAIN = {
    "Value error, ": "",
    "Input should be": "it has to be",
    "Field required": "it is missing",
    "Extra inputs are not permitted": "there is no such entry",
}


def refusal_of(found: Mapping[str, Any]) -> str:
    """One of pydantic's complaints, `error.errors()[0]`, in words for people."""
    text = str(found["msg"])
    for theirs, ours in _PLAIN.items():
        text = text.replace(theirs, ours)
    return text


def listed(names: list[str], limit: int = 3) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(str, names[:limit])) + more
