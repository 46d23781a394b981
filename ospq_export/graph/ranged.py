"""torch.export of a network for a range of image sizes: whether it has one, and in which steps."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx, nn

from ospq_export.errors import InputError, reason_of
from ospq_export.graph.sizes import SizeRange, propagate, shown

log = logging.getLogger(__name__)
_WHERE = "`size_range`"
_LEAVE_OUT = "leave the range out, or give sizes that the network takes"
_ROUNDS = 4  # a step that torch finds may bring to light a further one
# How torch.export says that a size has to be a multiple of a number.
_STEP = re.compile(r"^\s*(_*)(height|width) = (\d+)\*_+(?:height|width)\s*$", re.MULTILINE)
_FIXED = "specialized it to be a constant"


@contextlib.contextmanager
def unlogged(name: str) -> Iterator[None]:
    """Without the tracebacks that a logger writes of an error that is raised as well."""
    logger = logging.getLogger(name)
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


def check_ends(model: nn.Module, channels: int, sizes: SizeRange) -> None:
    """Run the float network at both ends of a range.

    Raises:
        InputError: it takes no images of such a size; names the module that says so.
    """
    device = next(iter(model.parameters())).device
    for height, width in sizes.ends:
        _check_end(model, torch.zeros(1, channels, height, width, device=device))


def _check_end(model: nn.Module, images: Tensor) -> None:
    running: list[nn.Module] = []

    def enter(module: nn.Module, _: object) -> None:
        running.append(module)

    def leave(*_: object) -> None:
        running.pop()

    handles = [module.register_forward_pre_hook(enter) for module in model.modules()]
    handles += [module.register_forward_hook(leave) for module in model.modules()]
    try:
        with torch.no_grad():
            model(images)
    except Exception as error:
        what = f"the network does not take images of {shown(images.shape[2:])}: {reason_of(error)}"
        raise InputError(what, where=_named(model, running), fix=_fix(model)) from error
    finally:
        for handle in handles:
            handle.remove()


def _named(model: nn.Module, running: Sequence[nn.Module]) -> str:
    """The innermost of the modules that were running, by path and class."""
    paths = {module: path for path, module in model.named_modules()}
    inner = running[-1] if running else model
    return ", ".join(filter(None, (paths[inner], type(inner).__name__)))


def _fix(model: nn.Module) -> str:
    """What helps: some of timm's networks take other sizes when they are built for it."""
    builds = type(model).__module__.startswith("timm.")
    return _LEAVE_OUT + (", or build it with `model_kwargs` dynamic_img_size=True if it has that" * builds)


def export_ranged(
    model: nn.Module, example: Tensor, sizes: SizeRange
) -> tuple[torch.export.ExportedProgram, SizeRange]:
    """Capture a network with free height and width.

    Args:
        model: that runs at both ends of the range.
        example: images (2, C, H, W) float32 of a size of the range.
        sizes: the range that is asked for.

    Returns:
        The program, and the range with the steps that the network needs.

    Raises:
        InputError: the network fixes its sizes, or needs steps that an end or the example is no multiple of.
    """
    for _ in range(_ROUNDS):
        shapes = ({0: torch.export.Dim("batch"), **sizes.dimensions()},)
        try:
            program = torch.export.export(model, (example,), dynamic_shapes=shapes, strict=False)
        except Exception as error:
            stepped = _stepped(sizes, str(error))
            if stepped == sizes:
                raise InputError(_why(str(error)), where=type(model).__name__, fix=_fix(model)) from error
            sizes = stepped
            _check_steps(sizes, example)
        else:
            if sizes.step != (1, 1):
                log.info("input sizes: %s", sizes)
            return program, sizes
    raise InputError(
        f"the network takes sizes in steps that torch.export does not tell, up to {sizes.step}",
        where=_WHERE,
        fix="give the step behind the two sizes",
    )


def traced_sizes(own: Sequence[int], sizes: SizeRange) -> list[tuple[int, int]]:
    """Heights and widths to trace a network at, one after the other until one will do: the calibration's, and an uneven one.

    What a network does at its own size alone, at a square one say, is not what it does in the whole range: position
    embeddings that are interpolated are left as they are there.
    """
    corners = itertools.product(*zip(*sizes.ends, strict=True))
    uneven = [(height, width) for height, width in corners if height != width]
    return [(own[0], own[1]), *uneven[:1]]


def settle(module: fx.GraphModule, input_size: Sequence[int], sizes: SizeRange) -> None:
    """Give a graph its range, and its nodes the shapes of the calibration's size.

    Raises:
        InputError: the graph does not take all sizes of the range.
    """
    try:
        with unlogged("torch._subclasses.fake_tensor"):
            propagate(module, input_size, sizes)
    except Exception as error:
        what = f"the network has no such range of sizes: {reason_of(error)}"
        raise InputError(what, where=_WHERE, fix=_LEAVE_OUT) from error
    module.meta["sizes"] = sizes


def _check_steps(sizes: SizeRange, example: Tensor) -> None:
    for size in (*sizes.ends, tuple(example.shape[2:])):
        if sizes.why_not(size):
            fix = "give two ends, and an input size between them, that are multiples of it"
            what = f"the network takes sizes in steps of {shown(sizes.step)}, and {shown(size)} is none"
            raise InputError(what, where=_WHERE, fix=fix)


def _stepped(sizes: SizeRange, message: str) -> SizeRange:
    """The range with the steps that a message of torch.export asks for."""
    steps = dict(zip(("height", "width"), sizes.step, strict=True))
    for relative, side, factor in _STEP.findall(message):
        # Of a side that has a step already, a name with an underscore counts in that step.
        steps[side] = steps[side] * int(factor) if relative else math.lcm(steps[side], int(factor))
    return sizes.model_copy(update={"step": (steps["height"], steps["width"])})


def _why(message: str) -> str:
    """Torch's reason in one line."""
    if _FIXED in message:
        return "the network's graph has one height and width built in: it has no range of sizes"
    lines = [line.strip(" -") for line in message.splitlines() if line.strip().startswith("- ")]
    reason = lines[0] if lines else message.strip().partition("\n")[0]
    for number, side in ((2, "height"), (3, "width")):
        reason = re.sub(rf"L\['\w+'\]\.size\(\)\[{number}\]", side, reason).replace(f"{side} = {side}", side)
    reason = reason.replace("in the specified range ", "in ").replace(
        "satisfy the generated guard", "satisfy"
    )
    return f"the network has no such range of sizes: {reason[:300]}"
