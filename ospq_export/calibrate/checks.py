"""What is checked before a calibration, so that it is not said after it.

That is the module, its graph, the images, the folder, the batch, the processes, and the run that is to be continued.

A captured graph is one function of one image at a time. A module that is not, one in training mode, one with random numbers or
one whose logits depend on the other images of the batch, would be calibrated, exported and found faithful to the wrong function.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor, fx, nn

from ospq_export.errors import InputError, listed
from ospq_export.graph.outputs import as_tuple, named_leaves, output_names
from ospq_export.graph.sizes import SizeRange
from ospq_export.recipes import Recipe
from ospq_export.runs.files import MANIFEST, is_temporary
from ospq_export.runs.manifest import Manifest, check_files, read_manifest
from ospq_export.runs.tensors import image_digests

log = logging.getLogger(__name__)

# Operators that multiply and add like the quantizable ones, and are left in float.
_PRODUCTS = re.compile(
    r"conv(?!2d$)|_convolution|bilinear|lstm|gru|rnn_|baddbmm|addbmm|addmv|mv|dot|_trilinear"
)
# Of the largest logit; rounding in float32 stays a hundred times below it, a wrong graph does not.
_TOLERANCE = 1e-2
_IMAGES = 3
LOCK = ".lock"


def check_module(model: nn.Module) -> None:
    """Refuse a module that is not the float32 network in eval mode that the later stages rebuild.

    Raises:
        InputError: it is wrapped, in training mode, or its parameters are not float32.
    """
    name = type(model).__name__
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise InputError("the network is wrapped for several devices", where=name, fix="pass model.module")
    if hasattr(model, "_orig_mod"):
        raise InputError("the network is compiled", where=name, fix="pass the module that was compiled")
    training = [path or name for path, module in model.named_modules() if module.training]
    if training:
        raise InputError(
            "the network is in training mode, where dropout and batch statistics are active",
            where=", ".join(training[:3]),
            fix="call model.eval()",
        )
    other = [path for path, tensor in model.named_parameters() if tensor.dtype is not torch.float32]
    if other:
        kind = str(model.get_parameter(other[0]).dtype).removeprefix("torch.")
        raise InputError(
            f"{len(other)} parameters are {kind}, not float32",
            where=", ".join(other[:3]),
            fix="call model.float()",
        )


def check_graph(model: nn.Module, captured: fx.GraphModule, images: Tensor) -> None:
    """Hold the captured graph to the module it was captured from, on a few images.

    Args:
        model: of images (B, C, H, W) float32.
        captured: its graph, with the names that it was captured with.
        images: float32 (N, C, H, W), normalised; the first few are used.

    Raises:
        InputError: the module gives other outputs for the same images a second time or in another batch, or the graph computes
            something else.
    """
    sample, names = images[:_IMAGES], output_names(captured.graph)
    with torch.no_grad():
        runs = [named_leaves(model(x)) for x in (sample, sample, sample[:1])]
        graph = dict(zip(names, as_tuple(captured(sample)), strict=True))
    for name in names:
        first, again, alone = (found[name] for found in runs)
        where = f"{type(model).__name__}, output {name}"
        if _differ(again, first):
            what = "the network gives other values for the same images a second time"
            raise InputError(what, where=where, fix="take random numbers and dropout out of its forward pass")
        if _differ(alone, first[:1]):
            what = "the output of an image depends on the other images of its batch"
            fix = "a normalisation by batch statistics needs running ones: track_running_stats=True"
            raise InputError(what, where=where, fix=fix)
        if _differ(graph[name], first):
            what = "the captured graph computes another output than the network"
            raise InputError(what, where=where, fix="report this model")


def check_sizes(model: nn.Module, captured: fx.GraphModule, images: Tensor) -> None:
    """`check_graph` at the images' own size, and of a graph with a range of sizes at both of its ends.

    Raises:
        InputError: as `check_graph`.
    """
    check_graph(model, captured, images)
    sizes: SizeRange | None = captured.meta.get("sizes")
    for end in () if sizes is None else sizes.ends:
        resized = nn.functional.interpolate(images[:_IMAGES], end, mode="bilinear", antialias=True)
        check_graph(model, captured, resized)


def _differ(mine: Tensor, theirs: Tensor) -> bool:
    # What is not finite is said with the name of the activation by the observation.
    if not bool(torch.isfinite(theirs).all()):
        return False
    # A NaN on one side alone is a difference too.
    return not bool((mine - theirs).abs().max() <= _TOLERANCE * theirs.abs().max().clamp_min(1e-12))


def float_products(captured: fx.GraphModule) -> list[str]:
    """Products that have no quantized form here and stay float: "conv1d in layers.0"; a warning where there are some."""
    found = []
    for node in captured.graph.nodes:
        kind = str(node.target).partition(".")[2].partition(".")[0]
        if node.op == "call_function" and _PRODUCTS.match(kind):
            found.append(f"{kind} in {node.meta.get('module_path') or '(root)'}")
    if found:
        log.warning(
            "%d operators with weights or sums of products have no quantized form and stay float: %s%s",
            len(found),
            ", ".join(found[:5]),
            ", ..." if len(found) > 5 else "",
        )
    return found


def say_substituted(substituted: dict[str, str]) -> dict[str, str]:
    """Warn of operators that have not the format of their role, reason by reason; the same operators."""
    for reason in dict.fromkeys(substituted.values()):
        names = [name for name, why in substituted.items() if why == reason]
        log.warning("%s: another format than its role's, because %s", listed(names), reason)
    return substituted


def check_images(images: Tensor) -> int:
    """How many of the calibration images are distinct; a warning where some are copies.

    Args:
        images: float32 (N, C, H, W), normalised.

    Raises:
        InputError: every channel has one value, the same in every image.
    """
    if bool((images.amax((0, 2, 3)) == images.amin((0, 2, 3))).all()):
        raise InputError(
            "all calibration images are of one colour: no range can be found from them",
            where="`data`",
            fix="give images like those that the network will see",
        )
    distinct = len(set(image_digests(images.cpu().numpy())))
    if distinct < len(images):
        log.warning("only %d of the %d calibration images are distinct", distinct, len(images))
    return distinct


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run directory, which is made if need be, and goes again where nothing was written into it.

    The operating system gives the lock up when its holder dies, however it dies: a lock file that is left over holds nobody.

    Raises:
        InputError: another process holds it, or the folder cannot be made.
    """
    existed = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=0)
        lock.acquire()
    except Timeout as error:
        raise InputError(
            "another process is calibrating into this folder",
            where=folder,
            fix="wait for it, or choose another `out`",
        ) from error
    except OSError as error:
        raise InputError(
            f"cannot be written: {error.strerror or error}", where=folder, fix="choose another folder"
        ) from error
    try:
        yield
    finally:
        # Removed while it is still held: who opens the name afterwards makes a lock of its own.
        (folder / LOCK).unlink(missing_ok=True)
        lock.release()
        if not existed:
            with contextlib.suppress(OSError):
                folder.rmdir()


def check_output_folder(out: Path) -> None:
    """Refuse a folder that holds anything but an interrupted calibration.

    Raises:
        InputError: `out` is a file, a finished run, or a folder with other content.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError("the output is not a folder", where=out, fix="choose another `out`")
    if all(path.name == LOCK or is_temporary(path) for path in out.iterdir()):
        return
    if not (out / MANIFEST).is_file():
        raise InputError("the output folder is not empty", where=out, fix="choose another `out`")
    if read_manifest(out).status == "calibrated":
        raise InputError(
            "the output folder already holds a finished run", where=out, fix="choose another `out`"
        )


def check_batch(recipe: Recipe, images: int) -> None:
    """Hold the number of images to the recipe's batch.

    Raises:
        InputError: there are too few.
    """
    settings = recipe.reconstruction
    if settings.iterations > 0 and images < settings.batch_size:
        raise InputError(
            f"{images} calibration images are fewer than a batch of {settings.batch_size}",
            where="`data`",
            fix=f"give more images, or `overrides` reconstruction.batch_size={images}",
        )


def check_processes(recipe: Recipe) -> None:
    """Hold the recipe's batch to the number of processes.

    Raises:
        InputError: they cannot share it evenly.
    """
    size, batch = int(os.environ.get("WORLD_SIZE", "1")), recipe.reconstruction.batch_size
    if batch % size:
        raise InputError(
            f"a batch of {batch} images cannot be shared evenly by {size} processes",
            where="reconstruction.batch_size",
            fix=f"`overrides` reconstruction.batch_size={max(1, batch // size) * size}",
        )


def check_same(out: Path, found: Manifest, manifest: Manifest) -> None:
    """Hold an interrupted run to the one that is about to continue it.

    Args:
        out: the run directory.
        found: its manifest.
        manifest: what this run would have written at its start.

    Raises:
        InputError: they differ.
    """
    check_files(out, found)
    theirs, mine = found.identity(), manifest.identity()
    changed = [key for key in mine if mine[key] != theirs[key]]
    if changed:
        what = "; ".join(differences(theirs, mine))
        raise InputError(
            f"the interrupted run there was made with another {', '.join(changed)} ({what})",
            where=out,
            fix="repeat the very same command to resume, or choose another `out`",
        )
    before, now = found.calibration.threads, manifest.calibration.threads
    if before not in (None, now):
        log.warning(
            "the run was begun with %d threads and goes on with %d: the last digits of its sums differ from those of a "
            "run that is not interrupted; `threads` %d avoids it",
            before,
            now,
            before,
        )


def differences(theirs: object, mine: object, name: str = "") -> list[str]:
    """What two identities differ in, as "recipe.reconstruction.iterations: 3, now 4"; digests are shortened."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        keys = dict.fromkeys([*theirs, *mine])
        pairs = ((f"{name}.{key}" if name else str(key), key) for key in keys)
        return [d for path, key in pairs for d in differences(theirs.get(key), mine.get(key), path)]
    if theirs == mine:
        return []
    shown = [str(value)[:12] if len(str(value)) > 40 else str(value) for value in (theirs, mine)]
    return [f"{name}: {shown[0]}, now {shown[1]}"]
