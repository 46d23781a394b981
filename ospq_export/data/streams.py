"""Images that come in one after the other and only once: their number, and what follows, are not known beforehand."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from ospq_export.data.choice import ClassChoice, Classes
from ospq_export.data.class_map import class_name
from ospq_export.data.classes import agreed, from_map
from ospq_export.data.config import DataConfig, ImagesRecord
from ospq_export.data.found import is_number
from ospq_export.data.images import ImageSet
from ospq_export.data.labels import BY_NUMBER
from ospq_export.data.loading import Batch, Images, Item
from ospq_export.data.sources import NO_LABEL, Held, Record
from ospq_export.errors import InputError

_HELD = 256
_SPARE = 8


@dataclass(frozen=True)
class Stream:
    """Images of unknown number.

    Attributes:
        root: Where they come from.
        records: Opens it; of a pipe, once.
        once: Whether it can be opened once only, by one process.
    """

    root: str
    records: Callable[[], Iterator[Record]]
    once: bool = False


class StreamSet(Images):
    """Images out of a stream, still in the shape of an image set: it has no length, no names, and no order but its own.

    Args:
        stream: Where they come from.
        config: The preprocessing.
        classes: Outputs by class name; without any, class names are refused, or passed over where no labels are needed.
        needed: Whether labels are needed.
    """

    ids: tuple[str, ...] = ()
    _found_source: str | None = None

    def __init__(self, stream: Stream, config: DataConfig, classes: Classes, *, needed: bool = True) -> None:
        super().__init__(config, classes.indices, stream.root, ImagesRecord())
        self._stream = stream
        self._needed = needed
        self._classes_source = classes.source
        self._labelled: bool | None = None

    @property
    def record(self) -> ImagesRecord:
        """Where the images came from, with what was noted on those read so far."""
        return super().record.model_copy(update={"classes_source": self._found_source})

    def at_most(self, count: int) -> int:
        """How many of `count` images there can be: that is not known, so all."""
        return count

    def batches(
        self, batch_size: int, indices: Sequence[int] | None = None, workers: int = 0
    ) -> Iterator[Batch]:
        """Streams the readable images as they come, all of them; see `ImageSet.batches`.

        Raises:
            InputError: There is none, the stream breaks off, or a label is no class.
        """
        return self._batched(self._items(batch_size, workers), batch_size, self._nothing())

    def sample(self, count: int, seed: int, workers: int = 0) -> Batch:
        """A random sample, drawn in one pass in which no more than the sample is held; see `ImageSet.sample`.

        Raises:
            InputError: As `batches`, or no image is asked for.
        """
        if count < 1:
            raise InputError("no images are asked for", where=count, fix="ask for one at least")
        # Some more, in place of those that cannot be read.
        drawn = [record for _, record in self._drawn(count + count // _SPARE + _SPARE, seed)]
        images = self._held(drawn)
        return images.first(count, range(len(images)), workers)

    def drawn(self, count: int, seed: int = 0) -> ImageSet:
        """A random sample as a set of its own, in the stream's order."""
        drawn = sorted(self._drawn(count, seed), key=lambda pair: pair[0])
        return self._held([record for _, record in drawn])

    def _drawn(self, count: int, seed: int) -> list[tuple[int, Record]]:
        """Places and records of a sample without replacement, in random order.

        Every image draws a number, and those with the smallest stay: Fan, Muller, Rezucha (1962), method 1.
        """
        rng = np.random.default_rng(seed)
        # A heap has its smallest entry on top, and the largest number is the one to leave.
        heap: list[tuple[float, int, Record]] = []
        for place, record in enumerate(self._stream.records()):
            entry = (-rng.random(), place, record)
            if len(heap) < count:
                heapq.heappush(heap, entry)
            else:
                heapq.heappushpop(heap, entry)
        if not heap:
            raise self._nothing()
        return [(place, record) for _, place, record in sorted(heap, key=lambda entry: -entry[0])]

    def _held(self, records: list[Record]) -> ImageSet:
        """Records as a set, whose unreadable images and notes are this set's."""
        source = self._source(records)
        images = ImageSet(source, self.config, self.class_to_idx, self._name, self.record)
        images.skipped, images._notes = self.skipped, self._notes
        return images

    def _source(self, records: list[Record]) -> Held:
        labels = np.array([self._label(record) for record in records], np.int64)
        contents = dict(enumerate(record.content for record in records))
        return Held(contents, labels, [record.id for record in records])

    def _items(self, batch_size: int, workers: int) -> Iterator[Item]:
        records, first = self._stream.records(), 0
        while held := list(islice(records, max(_HELD, batch_size))):
            yield from self._decoded(self._source(held), range(len(held)), batch_size, workers, first)
            first += len(held)

    def _label(self, record: Record) -> int:
        """The record's class number.

        Raises:
            InputError: Its name is not known, its number is none, or some images have a label and others none.
        """
        there = record.label not in (None, "")
        if self._labelled is None:
            self._labelled = there
        if there != self._labelled:
            raise self._refused(f"{record.id} has {'a' if there else 'no'} label, unlike those before")
        if not there or not (self._needed or self.class_to_idx):
            return NO_LABEL
        if isinstance(record.label, str) and (record.by_name or not is_number(record.label)):
            return self._index_of(class_name(record.label), record.id)
        number = int(record.label or 0)
        if number < NO_LABEL:
            raise self._refused(f"the label {number} of {record.id} is no class")
        self._found_source = BY_NUMBER
        return number

    def _index_of(self, name: str, where: str) -> int:
        if name in self.class_to_idx:
            self._found_source = self._classes_source
            return self.class_to_idx[name]
        if not self._needed:
            return NO_LABEL
        known = (
            f"is not among {len(self.class_to_idx)} classes" if self.class_to_idx else "cannot be numbered"
        )
        raise self._refused(
            f"the class {name!r} of {where} {known}", "give `class_map` FILE, which names every class"
        )

    def _nothing(self) -> InputError:
        return InputError("no image in this stream can be read", where=self._name, fix="give one with images")

    def _refused(self, what: str, fix: str = "label every image, or none") -> InputError:
        return InputError(what, where=self._name, fix=fix)


def stream_classes(choice: ClassChoice, known: Classes | None, outputs: int | None) -> Classes:
    """What is known of the classes of a stream: those of a run, or of a class map. Whole numbers are the network's outputs.

    Raises:
        InputError: The class map contradicts the run or the network.
    """
    if known is not None and known.indices:
        return agreed(choice, known)
    return (
        Classes({}, BY_NUMBER)
        if choice.map_file is None
        else from_map(choice.map_file, outputs and max(outputs, 2))
    )
