"""The optimization profile of an engine: min, opt and max of the batch and of the images' sides that its file leaves free."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ospq_export.errors import InputError

Triple = tuple[int, int, int]


def free_sides(model: Any) -> dict[str, Triple]:
    """The sides of images that a file leaves free, by name, each with its min, opt and max; opt is the calibration's.

    Args:
        model: an `onnx.ModelProto`; its metadata says so where it was exported from a run with a range of sizes.
    """
    metadata = {p.key: p.value for p in model.metadata_props}
    if not metadata.get("size_range"):
        return {}
    try:
        sizes, calibrated = (json.loads(metadata[key]) for key in ("size_range", "preprocessing"))
        rows = zip(sizes["smallest"], calibrated["input_size"][1:], sizes["largest"], strict=True)
        sides = {
            name: (int(a), int(b), int(c)) for name, (a, b, c) in zip(("height", "width"), rows, strict=True)
        }
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            "its metadata says of its input sizes what cannot be read", fix="export it again"
        ) from error
    return {name: side for name, side in sides.items() if side[0] < side[2]}


def profiles(network: Any, batches: Triple | None, file: Path) -> list[Any]:
    """The optimization profiles that a network needs, for Polygraphy; none where all is fixed.

    Args:
        network: parsed from `file`; its first input is the images.
        batches: min, opt and max; None is 1.
        file: what the metadata is read from.

    Raises:
        InputError: the file has another batch, or does not say which sizes it takes.
    """
    from polygraphy.backend.trt import Profile

    images = network.get_input(0)
    shape = tuple(images.shape)
    if shape[0] != -1 and batches is not None and set(batches) != {shape[0]}:
        raise InputError(
            f"the file has a static batch of {shape[0]}", where="`profile`", fix="export a dynamic one"
        )
    if -1 not in shape:
        return []
    sides = list(_sides(file).values()) if -1 in shape[1:] else []
    if list(shape[1:]).count(-1) != len(sides):
        fix = "export it from a run that was calibrated with `size_range`"
        raise InputError("the file leaves sizes free and does not say between which", where=file, fix=fix)
    # Height comes before width, in both layouts.
    left = iter(sides)
    rows = [(batches or (1, 1, 1)) if shape[0] == -1 else (shape[0],) * 3]
    rows += [next(left) if size == -1 else (size,) * 3 for size in shape[1:]]
    return [Profile().add(images.name, *zip(*rows, strict=True))]


def _sides(file: Path) -> dict[str, Triple]:
    import onnx

    return free_sides(onnx.load(str(file), load_external_data=False))
