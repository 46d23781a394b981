"""Reading a checkpoint file, without running code, into the sets of weights that it holds."""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ospq_export.errors import InputError, listed
from ospq_export.models.foreign import foreign_file, is_safetensors

StateDict = dict[str, Tensor]
_SAVE = "save model.state_dict(): a file that holds tensors only"
_DEEPEST = 5


@dataclass(frozen=True)
class WeightSet:
    """Tensors by name that lie together in a file: at `entry`, a dotted path; "" is the file itself."""

    entry: str
    tensors: StateDict


def read_checkpoint(path: Path) -> list[WeightSet]:
    """All sets of tensors in a file, in its order; other content (epoch, optimizer, arguments) is passed over.

    Args:
        path: a safetensors file or a torch file, told apart by their content.

    Raises:
        InputError: the file cannot be read, is something else, or holds no named tensors.
    """
    try:
        foreign = foreign_file(path)
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error), "give the path of a checkpoint") from error
    if foreign is not None:
        raise _unreadable(path, f"it is {foreign.what}", foreign.fix)
    content = _read_safetensors(path) if is_safetensors(path) else _read_torch(path)
    found = list(_sets(content, ""))
    if not found:
        raise InputError(
            f"the checkpoint holds no state dictionary, but {_described(content)}",
            where=path,
            fix="save model.state_dict(), plain or under the key 'state_dict'",
        )
    return found


def _unreadable(path: Path, reason: str, fix: str) -> InputError:
    return InputError(f"the checkpoint cannot be read: {reason}", where=path, fix=fix)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, f"damaged safetensors ({error})", "download it again") from error


def _read_torch(path: Path) -> Any:
    # What trainers commonly store beside tensors; making any of these runs no code of the file's.
    scalar: Any = np.float64(0).__reduce__()[0]
    kinds = [type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"]
    harmless = [argparse.Namespace, np.dtype, scalar, *kinds, pathlib.PosixPath, pathlib.PurePosixPath]
    with torch.serialization.safe_globals(harmless):
        try:
            # Given the name, torch goes by its ending.
            with path.open("rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, AttributeError, ImportError) as error:
            raise _not_tensors(path, error) from error
        except Exception as error:
            # A damaged archive raises whatever its damage leads to.
            raise _unreadable(path, "damaged or cut short", "download it again") from error


def _not_tensors(path: Path, error: Exception) -> InputError:
    """What the file holds beside tensors, in place of torch's advice to run it."""
    names: list[str] = []
    with contextlib.suppress(Exception), path.open("rb") as file:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    names = names or re.findall(r"(?:GLOBAL|global|class) '?([\w.]+\.[\w.]+)", str(error))
    if any("distributed" in name for name in names):
        fix = (
            "save the whole state dictionary (get_model_state_dict with full_state_dict=True) in one process"
        )
        return _unreadable(path, f"it holds the shards of a distributed run ({names[0]})", fix)
    if names:
        shown = ", ".join(dict.fromkeys(names[:3]))
        return _unreadable(path, f"it holds Python objects ({shown}), which are not run", _SAVE)
    what = "it is no safetensors file and no torch file, or it is damaged"
    return _unreadable(path, what, f"download it again, or {_SAVE}")


def _sets(content: Any, entry: str) -> Iterator[WeightSet]:
    """All mappings with tensors by name; `entry` is the dotted path of `content`."""
    if entry.count(".") >= _DEEPEST:
        return
    if isinstance(content, list | tuple):
        content = {str(i): value for i, value in enumerate(content) if isinstance(value, Mapping)}
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        return
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if tensors:
        yield WeightSet(entry, tensors)
    for key, value in content.items():
        yield from _sets(value, f"{entry}.{key}" if entry else key)


def _described(content: Any) -> str:
    if isinstance(content, Mapping):
        return f"the entries {listed(list(content), 5)}" if content else "nothing"
    return f"a {type(content).__name__}"
