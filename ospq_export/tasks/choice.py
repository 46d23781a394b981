"""All tasks, and which one outputs look like."""

from __future__ import annotations

from collections.abc import Sequence

from ospq_export.errors import InputError
from ospq_export.tasks.base import Shapes, Task
from ospq_export.tasks.classify import CLASSIFY
from ospq_export.tasks.dense import Dense
from ospq_export.tasks.embed import Embed
from ospq_export.tasks.tensors import TensorsTask

TASKS: dict[str, Task] = {task.name: task for task in (CLASSIFY, Embed(), Dense(), TensorsTask())}
_FEATURES = ("embed", "feature", "pool")
# Segmentation heads give logits at a quarter or an eighth of the image's size; the feature maps of backbones end below.
_COARSEST = 8


def find_task(name: str) -> Task:
    """A task by its name.

    Raises:
        InputError: there is none.
    """
    if name not in TASKS:
        raise InputError(f"there is no task {name!r}", where="`task`", fix=f"use one of {', '.join(TASKS)}")
    return TASKS[name]


def choose_task(
    wanted: str | None, shapes: Shapes, input_size: Sequence[int], *, headless: bool = False
) -> tuple[Task, str]:
    """The task that is asked for, or the one that the outputs look like.

    Args:
        wanted: its name; None guesses.
        shapes: of the outputs for one image.
        input_size: (channels, height, width) of the image.
        headless: whether the network says that it has no classifier.

    Returns:
        The task, and what the guess rests on; "" where it was asked for.

    Raises:
        InputError: there is no such task, or the outputs do not fit it.
    """
    name, reason = (wanted, "") if wanted is not None else _guess(shapes, input_size, headless)
    task = find_task(name)
    task.check(shapes)
    return task, reason


def _guess(shapes: Shapes, input_size: Sequence[int], headless: bool) -> tuple[str, str]:
    if len(shapes) > 1:
        return "tensors", f"it has {len(shapes)} outputs"
    ((name, shape),) = shapes.items()
    if len(shape) == 1:
        featured = headless or any(word in name for word in _FEATURES)
        return ("embed", "it has no classifier") if featured else ("classify", "it gives a vector")
    if len(shape) == 3 and shape[1] * _COARSEST >= input_size[1] and shape[2] * _COARSEST >= input_size[2]:
        return (
            "dense",
            f"it gives maps of {shape[1]} x {shape[2]} for images of {input_size[1]} x {input_size[2]}",
        )
    return "tensors", f"its output has the shape {tuple(shape)}"
