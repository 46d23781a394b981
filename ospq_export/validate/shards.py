"""Several processes share one validation: each takes a run of whole batches, afterwards all know what all found."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ospq_export.errors import InputError
from ospq_export.tasks.comparison import Collector
from ospq_export.validate.codes.samples import Samples
from ospq_export.validate.executions.backends import FloatArray
from ospq_export.world.processes import World


def share_of(world: World, count: int, batch_size: int) -> range:
    """This process's images out of `count`: whole batches, so that every image meets the companions that it meets in one process.

    Raises:
        InputError: there are fewer batches than processes.
    """
    batches = -(-count // batch_size)
    if batches < world.size:
        raise InputError(
            f"{batches} batches for {world.size} processes",
            where="`batch_size`",
            fix="lower it, or start fewer processes",
        )
    first, last = (batches * place // world.size for place in (world.rank, world.rank + 1))
    return range(first * batch_size, min(count, last * batch_size))


def part_of(total: int, share: int, count: int) -> int:
    """The part of `total` sampled images that falls to `share` of `count` images, rounded up."""
    return -(-total * share // count)


def pool(
    world: World,
    collector: Collector,
    seconds: dict[str, float],
    unreadable: Sequence[str],
    samples: Samples,
    notes: Mapping[str, int],
) -> tuple[Collector, dict[str, float], list[str], dict[str, int]]:
    """Exchange what the processes found in their shares.

    Args:
        world: who shares the validation.
        collector: this process's logits, labels and ids.
        seconds: spent in each execution.
        unreadable: images that could not be read.
        samples: afterwards those of all processes.
        notes: on the images of this share, and for how many of them.

    Returns:
        The collector of all images in order; seconds summed over the processes; all unreadable images; notes, summed.
    """
    if world.size == 1:
        return collector, seconds, list(unreadable), dict(notes)
    kept = np.concatenate(samples.kept) if samples.kept else np.empty((0, 0, 0, 0), np.float32)
    mine = {
        "labels": collector.labels().tolist(),
        "ids": collector.ids,
        "seconds": seconds,
        "unreadable": list(unreadable),
        "notes": dict(notes),
        "kept": kept.shape,
        "seen": samples.seen,
        "floor": None if samples.meter is None else samples.meter.counts(),
    }
    told = [json.loads(text) for text in world.tell(json.dumps(mine))]
    tensors = [*(collector.logits(name) for name in seconds), kept]
    parts = world.gather({world.rank: [torch.from_numpy(t).flatten() for t in tensors]}, world.size)
    whole = Collector(sum(len(facts["ids"]) for facts in told))
    samples.kept, samples.seen = [], sum(facts["seen"] for facts in told)
    for place, (facts, flat) in enumerate(zip(told, parts, strict=True)):
        rows = [t.view(len(facts["ids"]), -1).numpy() for t in flat[:-1]]
        whole.add(
            dict(zip(seconds, rows, strict=True)), np.array(facts["labels"], dtype=np.int64), facts["ids"]
        )
        if facts["kept"][0]:
            images: FloatArray = flat[-1].view(facts["kept"]).numpy()
            samples.kept.append(images)
        if samples.meter is not None and place != world.rank:
            samples.meter.absorb(facts["floor"])
    total = {name: sum(facts["seconds"][name] for facts in told) for name in seconds}
    everywhere = sum((Counter(facts["notes"]) for facts in told), Counter())
    return (
        whole,
        total,
        list(dict.fromkeys(n for facts in told for n in facts["unreadable"])),
        dict(everywhere),
    )
