"""A run as a model of NVIDIA's Triton Inference Server: a folder with the file, config.pbtxt, and the classes' names.

Format: https://github.com/triton-inference-server/server, docs/user_guide/model_repository.md.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ospq_export.engines.products import Product
from ospq_export.errors import InputError, damaged, listed, reason_of
from ospq_export.export.triton_config import LABELS, Served, configuration, file_name, messages
from ospq_export.onnx.signature import TensorType, signature_of
from ospq_export.runs.files import (
    QUANTIZED_ONNX,
    UINT8_ONNX,
    check_file,
    data_file,
    stored_bytes,
)
from ospq_export.runs.run import Run
from ospq_export.world.room import check_disk, check_folder

log = logging.getLogger(__name__)
_CONFIG, _VERSION = "config.pbtxt", "1"
# What a dynamic batch may grow to in a server; config.pbtxt may be edited.
_MOST_IMAGES = 32


def model_name(run: Run, name: str | None) -> str:
    """What a run is called on a server: `name`, or the run directory's own.

    Raises:
        InputError: it can be no folder's name, or no part of an address.
    """
    found = name or run.path.resolve().name
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", found):
        fix = "use letters, digits, '_', '-' and '.'"
        raise InputError(f"{found!r} can be no model's name", where="`triton_model`", fix=fix)
    return found


def check_repository(run: Run, repository: Path, name: str, *, overwrite: bool) -> None:
    """What can be known before anything is exported.

    Raises:
        InputError: the repository cannot be written, has a model of this name, or the package tritonclient is missing.
    """
    messages()
    check_folder(repository, "`triton`")
    if (repository / name).exists() and not overwrite:
        fix = "give `overwrite`, or another name as `triton_model`"
        raise InputError(f"the repository has a model {name}", where=repository, fix=fix)
    held = [f for f in (QUANTIZED_ONNX, UINT8_ONNX) if f in run.manifest.files]
    check_disk(
        repository,
        "the model's files",
        certain=0,
        likely=max([stored_bytes(run.path / f) for f in held], default=0),
    )


def write_model(run: Run, repository: Path, name: str, *, overwrite: bool = False) -> Served:
    """Write a model folder into a repository: <name>/config.pbtxt, labels.txt and version 1.

    A TensorRT engine of the run is served where there is one; else the file that takes uint8 images, where there is one; else
    model.onnx. The folder is made under a temporary name and then renamed; a model that it replaces goes only then.

    Args:
        run: exported.
        repository: made if need be.
        name: of the model.
        overwrite: whether a model of that name may be replaced.

    Returns:
        What is served.

    Raises:
        InputError: as `check_repository`; the run is not exported, or has no file that Triton can run.
    """
    check_repository(run, repository, name, overwrite=overwrite)
    served = served_file(run)
    names = _class_names(run, served)
    text = configuration(run, served, name, labelled=bool(names))
    with _taking(repository, name) as folder:
        version = folder / _VERSION
        version.mkdir()
        # Weights beside an ONNX file are found by the name that the file gives them.
        shutil.copyfile(served.path, version / file_name(served))
        if data_file(served.path).is_file():
            shutil.copyfile(data_file(served.path), version / data_file(served.path).name)
        if names:
            (folder / LABELS).write_text("".join(f"{' '.join(n.split())}\n" for n in names), encoding="utf-8")
        (folder / _CONFIG).write_text(text, encoding="utf-8")
    return served


@contextlib.contextmanager
def _taking(repository: Path, name: str) -> Iterator[Path]:
    """An empty folder that becomes repository/name at the end."""
    try:
        repository.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}.", suffix=".tmp", dir=repository) as made:
            fresh, old, place = Path(made) / "new", Path(made) / "old", repository / name
            fresh.mkdir()
            yield fresh
            if place.exists():
                place.rename(old)
            fresh.rename(place)
    except OSError as error:
        fix = "free some space or choose another folder"
        raise InputError(
            f"cannot be written: {error.strerror or error}", where=repository, fix=fix
        ) from error


def served_file(run: Run) -> Served:
    """What Triton serves of a run.

    Raises:
        InputError: it has nothing that Triton can run.
    """
    engine = _engine(run)
    if engine is not None:
        return engine
    file = UINT8_ONNX if UINT8_ONNX in run.manifest.files else QUANTIZED_ONNX
    path = run.file(file)
    if check_file(QUANTIZED_ONNX) in run.manifest.files:
        fix = "build an engine with `engine` tensorrt"
        raise InputError("ONNX Runtime does not have this file's operators", where=path, fix=fix)
    found = signature_of(path)
    batches = (1, _MOST_IMAGES, _MOST_IMAGES) if found.inputs[0].shape[0] < 0 else None
    return Served(path, "onnxruntime", found.inputs[0], found.outputs, batches, run.data.input_size[1:])


def _engine(run: Run) -> Served | None:
    """The run's TensorRT engine; TensorRT-RTX's cannot be loaded by Triton."""
    found = []
    for name in sorted(n for n in run.manifest.files if n.endswith(".engine")):
        path = run.path / name
        try:
            record = json.loads(path.with_name(f"{name}.json").read_text(encoding="utf-8"))
            if record["product"] == Product.TENSORRT:
                found.append((path, record, _of_engine(path, record, run.data.input_size[1:])))
            else:
                log.warning("%s is for %s, which Triton does not load", name, record["product"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise damaged(f"the engine's sidecar cannot be read: {reason_of(error)}", path) from error
    if len(found) > 1:
        log.warning("%s is served, of %s", found[0][0].name, listed([path.name for path, *_ in found]))
    return found[0][-1] if found else None


def _of_engine(path: Path, record: Any, example: tuple[int, ...]) -> Served:
    described = (record["input"], *record["outputs"])
    first, *rest = (TensorType(t["name"], t["dtype"], tuple(t["shape"])) for t in described)
    batches = tuple(record["profile"]) if record["profile"] and first.shape[0] < 0 else None
    return Served(path, "tensorrt", first, tuple(rest), batches, example)


def _class_names(run: Run, served: Served) -> list[str]:
    """Names of the classes by index, where the outputs are a logit for each."""
    known = run.manifest.class_to_idx
    classes = sorted(known, key=known.__getitem__)
    fits = len(served.outputs) == 1 and served.outputs[0].shape[1:] == (len(classes),)
    in_order = [known[name] for name in classes] == list(range(len(classes)))
    return classes if run.manifest.task == "classify" and fits and in_order else []
