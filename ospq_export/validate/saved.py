"""The very tensors that a validation compared, as Polygraphy's `RunResults`: its tools go on from there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ospq_export.engines.products import quiet_polygraphy
from ospq_export.onnx.write import INPUT
from ospq_export.runs.files import replacing
from ospq_export.tasks.measure import Outputs
from ospq_export.tasks.statistics import FloatArray
from ospq_export.validate.executions.table import FAKE_QUANT
from ospq_export.world.room import check_file

SAVED_IMAGES = 8


def inputs_beside(path: Path) -> Path:
    """Where the images go: outputs.json has outputs.inputs.json beside it."""
    return path.with_name(f"{path.stem}.inputs.json")


class SavedOutputs:
    """Images and every execution's outputs for them, of the first `SAVED_IMAGES` images.

    An iteration is one image, or as many as a file with a fixed batch takes.

    Args:
        path: the file of outputs; the images go beside it (`inputs_beside`).
        batch_size: images per iteration.

    Raises:
        InputError: one of the two files cannot be written.
    """

    def __init__(self, path: Path, batch_size: int) -> None:
        for file in (path, inputs_beside(path)):
            check_file(file, "`save_outputs`")
        self.path, self.batch_size = path, batch_size
        self.wanted = -(-SAVED_IMAGES // batch_size) * batch_size
        self.images: list[FloatArray] = []
        self.outputs: dict[str, dict[str, list[FloatArray]]] = {}

    def add(self, images: FloatArray, outputs: Mapping[str, Outputs]) -> None:
        """Take what is wanted still of a batch (B, C, H, W) and of every execution's outputs for it."""
        room = self.wanted - sum(map(len, self.images))
        if room <= 0:
            return
        self.images.append(images[:room].copy())
        for execution, values in outputs.items():
            kept = self.outputs.setdefault(execution, {})
            for name, value in values.items():
                kept.setdefault(name, []).append(value[:room].copy())

    def _iterations(self, parts: Mapping[str, list[FloatArray]]) -> list[dict[str, FloatArray]]:
        whole = {name: np.concatenate(arrays) for name, arrays in parts.items()}
        # A file with a fixed batch takes no fewer images: a rest is left out.
        count = min(map(len, whole.values())) // self.batch_size
        steps = [slice(i * self.batch_size, (i + 1) * self.batch_size) for i in range(count)]
        return [{name: array[step] for name, array in whole.items()} for step in steps]

    def write(self) -> Sequence[Path]:
        """Write both files; a runner is called as the execution is."""
        from polygraphy.comparator import RunResults
        from polygraphy.json import save_json

        results = RunResults()
        # Polygraphy compares each runner with the next: a file of its own is held to the fake-quantized network, the first.
        for execution in sorted(self.outputs, key=lambda name: name != FAKE_QUANT):
            results.add(self._iterations(self.outputs[execution]), runner_name=execution)
        beside = inputs_beside(self.path)
        with quiet_polygraphy(), replacing(self.path) as outputs, replacing(beside) as inputs:
            results.save(str(outputs))
            save_json(self._iterations({INPUT: self.images}), str(inputs))
        return self.path, beside
