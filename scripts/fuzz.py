"""Damage what the program reads, many times over: it has to work or to say in one line what is wrong, nothing else.

    python scripts/fuzz.py --cases 10000 --seed 0

A small run is made once. Each case damages one of its files (bytes flipped, cut, doubled; a JSON or TOML value replaced by a
nasty one; hashes forged to match) and reads it as the program does. A case fails where anything but `InputError` is raised,
where its message is not one line, where reading takes longer than 20 seconds, or where a file appears outside the run directory.
Exit status 1 where any case failed; every failure is printed with the seed that repeats it.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ospq_export.calibrate import calibrate
from ospq_export.calibrate.checkpoints import parsed
from ospq_export.data import Batch, resolve_data_config
from ospq_export.errors import InputError
from ospq_export.export import export
from ospq_export.graph.quantizers import QuantizedGraph
from ospq_export.models.timm import ModelSpec, create_model
from ospq_export.models.weights import load_checkpoint
from ospq_export.onnx.lint import lint
from ospq_export.progress import stage_progress, stepper
from ospq_export.recipes import load_recipe
from ospq_export.runs.files import FLOAT_TENSORS, MANIFEST, QUANTIZED_TENSORS
from ospq_export.runs.manifest import SliceRecord, read_manifest, record_files
from ospq_export.runs.run import Run, load_bias, load_quantizers
from ospq_export.runs.tensors import read_tensors, write_tensors

SPEC = ModelSpec(
    name="vit_tiny_patch16_224",
    kwargs={
        "img_size": 16,
        "patch_size": 8,
        "in_chans": 1,
        "depth": 1,
        "num_classes": 3,
        "embed_dim": 16,
        "num_heads": 2,
    },
)
NASTY: list[Any] = [
    *(
        None,
        True,
        -1,
        0,
        1,
        2**70,
        -(2**63),
        1e308,
        float("nan"),
        float("inf"),
        "",
        "\x00",
        "é" * 300,
        [],
        {},
    ),
    *("../../outside", "/etc/passwd", "C:\\outside", [[]], {"": {}}, ["a", 1, None], "9" * 5000),
]
SECONDS = 20


def damage_bytes(data: bytes, random_: random.Random) -> bytes:
    """Flip, cut, double, insert or blank some bytes."""
    out = bytearray(data)
    for _ in range(random_.choice([1, 1, 1, 3, 20])):
        # Headers and structure lie in front: half of all damage goes there.
        reach = len(out) if random_.random() < 0.5 else min(len(out), 400)
        place, length = random_.randrange(reach + 1), random_.randrange(1, 64)
        kind = random_.randrange(6)
        if kind == 0:
            out[place : place + 1] = bytes([random_.randrange(256)])
        elif kind == 1:
            del out[place:]
        elif kind == 2:
            del out[place : place + length]
        elif kind == 3:
            out[place:place] = out[place : place + length]
        elif kind == 4:
            out[place:place] = random_.randbytes(length)
        else:
            out[place : place + length] = bytes([random_.choice([0, 255, 0x5B, 0x7B])]) * length
    return bytes(out)


def damage_value(value: Any, random_: random.Random) -> Any:
    """Replace, remove, add or nest something somewhere in a JSON value."""
    if isinstance(value, dict) and value and random_.random() < 0.9:
        key = random_.choice(list(value))
        kind = random_.random()
        if kind < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.15:
            return {**value, "surprise": random_.choice(NASTY)}
        return {**value, key: damage_value(value[key], random_)}
    if isinstance(value, list) and value and random_.random() < 0.9:
        place = random_.randrange(len(value))
        changed = [] if random_.random() < 0.1 else [damage_value(value[place], random_)]
        return [*value[:place], *changed, *value[place + 1 :]]
    if random_.random() < 0.02:
        return _nested(random_.choice([50, 5000]))
    return random_.choice(NASTY)


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def _json(value: Any) -> bytes:
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(100_000)
    try:
        return json.dumps(value).encode()
    finally:
        sys.setrecursionlimit(limit)


@dataclass
class Material:
    """A small finished run, and what reading it needs.

    Attributes:
        folder: the run directory, with a copy of its recipe, weights and a checkpoint of a slice.
        files: the undamaged content by name.
        network: with the run's quantizers, to load damaged ones into.
        model: the float model, to load damaged weights into.
    """

    folder: Path
    files: dict[str, bytes]
    network: QuantizedGraph
    model: nn.Module

    @classmethod
    def make(cls, folder: Path) -> Material:
        """Calibrate and export a network with random weights."""
        torch.manual_seed(0)
        model = create_model(SPEC)
        config = resolve_data_config(model, SPEC, {})
        images = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
        batch = Batch(images, torch.zeros(8, dtype=torch.int64), [str(i) for i in range(8)])
        short = ["calibration_images=8", "observation_images=8", "reconstruction.batch_size=8"]
        recipe = load_recipe("w4a4", [*short, "reconstruction.iterations=2"])
        run = calibrate(model, SPEC, batch, config, recipe, folder)
        export(folder)
        run = Run.open(folder)
        packaged = Path(sys.modules[load_recipe.__module__].__file__ or "").parent / "w4a4.toml"
        shutil.copy(packaged, folder / "recipe.toml")
        torch.save(model.state_dict(), folder / "weights.pt")
        write_tensors(folder / "weights.safetensors", model.state_dict())
        record = run.manifest.slices[0].model_dump_json()
        write_tensors(folder / "000.safetensors", {"x": torch.zeros(3)}, {"record": record})
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        return cls(folder, files, run.quantized_graph(), model)

    def write(self, name: str, content: bytes) -> Path:
        """Put damaged content in place of a file."""
        path = self.folder / name
        path.write_bytes(content)
        return path

    def forge(self, name: str) -> None:
        """Make the manifest's hash of a file match its damaged content."""
        manifest = read_manifest(self.folder)
        record_files(self.folder, manifest, name)

    def restore(self) -> None:
        """Undo all damage."""
        for name, content in self.files.items():
            (self.folder / name).write_bytes(content)

    def load(self) -> None:
        """Open the run and load its tensors into the network, as the later stages do."""
        run = Run.open(self.folder)
        path = run.file(QUANTIZED_TENSORS)
        tensors, _ = read_tensors(path)
        load_quantizers(self.network, run.manifest.quantizers, tensors, path)
        for bias in self.network.biases.values():
            load_bias(bias, tensors.get(bias.constant), path)


Case = Callable[[Material, random.Random], object]


def manifest_bytes(material: Material, random_: random.Random) -> None:
    """A manifest with damaged bytes."""
    material.write(MANIFEST, damage_bytes(material.files[MANIFEST], random_))
    material.load()


def manifest_values(material: Material, random_: random.Random) -> None:
    """A manifest that is JSON with wrong values."""
    value = json.loads(material.files[MANIFEST])
    for _ in range(random_.choice([1, 1, 4])):
        value = damage_value(value, random_)
    material.write(MANIFEST, _json(value))
    material.load()


def tensors(material: Material, random_: random.Random) -> None:
    """Damaged tensors, half of the time with a matching hash."""
    name = random_.choice([QUANTIZED_TENSORS, FLOAT_TENSORS])
    material.write(name, damage_bytes(material.files[name], random_))
    if random_.random() < 0.7:
        material.forge(name)
    material.load()
    read_tensors(material.folder / name)


def scales(material: Material, random_: random.Random) -> None:
    """Damaged scales.json: its hash tells."""
    material.write("scales.json", damage_bytes(material.files["scales.json"], random_))
    material.load()


def slice_checkpoint(material: Material, random_: random.Random) -> None:
    """A damaged checkpoint of a slice, as a resumed calibration reads it."""
    path = material.write("000.safetensors", damage_bytes(material.files["000.safetensors"], random_))
    _, header = read_tensors(path)
    parsed(SliceRecord, header.get("record", ""), path)


def recipe_bytes(material: Material, random_: random.Random) -> None:
    """A damaged recipe file."""
    load_recipe(str(material.write("recipe.toml", damage_bytes(material.files["recipe.toml"], random_))))


def recipe_override(material: Material, random_: random.Random) -> None:
    """An override with a wrong key or value."""
    key = random_.choice(
        ["weight_bits", "slicing", "reconstruction.iterations", "reconstruction", "a.b.c", "", "."]
    )
    value = random_.choice([str(n) for n in NASTY] + ["[" * random_.choice([1, 5000]), "'", '"""', "1e999"])
    load_recipe("w4a4", [f"{key}={value}"])


def onnx_file(material: Material, random_: random.Random) -> None:
    """A damaged QDQ file, linted."""
    lint(material.write("model.onnx", damage_bytes(material.files["model.onnx"], random_)))


def weights(material: Material, random_: random.Random) -> None:
    """Damaged weights of the float model, safetensors or a torch file."""
    name = random_.choice(["weights.pt", "weights.safetensors"])
    load_checkpoint(material.model, material.write(name, damage_bytes(material.files[name], random_)))


CASES: list[Case] = [
    *(manifest_bytes, manifest_values, tensors, scales, slice_checkpoint),
    *(recipe_bytes, recipe_override, onnx_file, weights),
]


class TooSlowError(Exception):
    """A case did not come to an end in time."""


@contextmanager
def _time_limit(seconds: int) -> Any:
    def expired(_signal: int, _frame: object) -> None:
        raise TooSlowError(f"more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, expired)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def run_case(material: Material, case: Case, seed: int) -> str:
    """What came of it: `read`, `refused`, or a traceback where the program failed."""
    before = set(material.folder.parent.rglob("*"))
    try:
        with _time_limit(SECONDS):
            case(material, random.Random(seed))
        outcome = "read"
    except InputError as error:
        one_line = "\n" not in str(error)
        outcome = "refused" if one_line else f"a message of several lines: {error}"
    except Exception:
        outcome = traceback.format_exc()
    strangers = set(material.folder.parent.rglob("*")) - before
    material.restore()
    return f"files appeared: {sorted(map(str, strangers))}" if strangers else outcome


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    failures = 0
    with tempfile.TemporaryDirectory() as root, stage_progress() as progress:
        material = Material.make(Path(root) / "sandbox" / "run")
        advance = stepper(progress, "fuzz", args.cases)
        for number in range(args.cases):
            case, seed = CASES[number % len(CASES)], args.seed + number
            outcome = run_case(material, case, seed)
            if outcome not in ("read", "refused"):
                failures += 1
                print(f"--- {case.__name__}, seed {seed}\n{outcome}")
                outcome = "failed"
            counts[f"{case.__name__} {outcome}"] += 1
            advance()
    print("\n".join(f"{name:<28} {count}" for name, count in sorted(counts.items())))
    print(f"{args.cases} cases, {failures} failures")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
