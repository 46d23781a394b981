"""Damage what the program reads, many times over: it has to work or to say in one line what is wrong, nothing else.

    python scripts/fuzz.py --cases 10000 --seed 0
    python scripts/fuzz.py --cases 2000 --recipe fp8 nvfp4

A small run is made of each recipe. Each case damages one of its files (bytes flipped, cut, doubled; a JSON or TOML value or a
tensor's numbers replaced by nasty ones; hashes forged to match) and reads it as the program does. A case fails where anything but
`InputError` is raised, where its message is not one line, where reading takes longer than 20 seconds, or where a file appears
outside the run directory. Exit status 1 where any case failed; every failure is printed with the seed that repeats it.
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
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ospq_export.calibrate import calibrate
from ospq_export.calibrate.checkpoints import restore, save
from ospq_export.data import Batch, resolve_data_config
from ospq_export.errors import InputError
from ospq_export.export import export
from ospq_export.graph.quantizers import QuantizedGraph
from ospq_export.graph.slicing import extract
from ospq_export.models.timm import ModelSpec, create_model
from ospq_export.models.weights import load_checkpoint
from ospq_export.onnx.lint import lint
from ospq_export.progress import stage_progress, stepper
from ospq_export.recipes import load_recipe, packaged_recipes
from ospq_export.runs.files import FLOAT_TENSORS, MANIFEST, QUANTIZED_ONNX, QUANTIZED_TENSORS, SCALES
from ospq_export.runs.manifest import read_manifest, record_files
from ospq_export.runs.quantizers import load_bias, load_quantizers
from ospq_export.runs.run import Run
from ospq_export.runs.tensors import read_tensors, write_tensors
from ospq_export.validate.codes.records import weight_comparisons
from ospq_export.validate.executions.origin import check_origin
from ospq_export.validate.executions.probes import read_proto

RECIPES = ("w4a4", "fp8", "nvfp4")
# Inner dimensions are multiples of 16: whole blocks of NVFP4.
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
FLOATS = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, -1.0, 1e-45, 1e-30, 3e38]
SLICE = "000.safetensors"
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


def damage_tensors(held: dict[str, Tensor], random_: random.Random) -> dict[str, Tensor]:
    """Wrong numbers, another type, another shape, a tensor lost or in another's place; of quantizers, most of the time."""
    ours = [name for name in held if name.endswith((".codes", ".scale", ".tensor_scale", ".offset"))]
    name = random_.choice(ours if random_.random() < 0.9 else list(held))
    value, kind = held[name].clone(), random_.randrange(8)
    if kind < 4:
        flat = value.view(-1)
        for _ in range(random_.choice([1, 1, 5])):
            place = random_.randrange(len(flat))
            flat[place] = _number(flat[place], random_)
    elif kind == 4:
        value = value.to(random_.choice([torch.float16, torch.float64, torch.int8, torch.uint8, torch.bool]))
    elif kind == 5:
        value = random_.choice([value[None], value.flatten()[:-1], value.flatten(), value.new_empty(0)])
    elif kind == 6:
        return {key: tensor for key, tensor in held.items() if key != name}
    else:
        value = held[random_.choice(list(held))].clone()
    return {**held, name: value}


def _number(old: Tensor, random_: random.Random) -> Any:
    """A nasty number of a tensor's type: codes are any bits, scales any float or a little beside the right one."""
    if not old.is_floating_point():
        info = torch.iinfo(old.dtype)
        return random_.randint(info.min, info.max)
    return random_.choice([*FLOATS, old * random_.choice([-1.0, 0.5, 1.001, 448.0, 2.0**20])])


@dataclass
class Material:
    """A small finished run, and what reading it needs.

    Attributes:
        recipe: its name.
        folder: the run directory, with a copy of its recipe, weights and a checkpoint of a slice.
        files: the undamaged content by name.
        network: with the run's quantizers, to load damaged ones into.
        piece: its first slice, to load a damaged checkpoint into.
        model: the float model, to load damaged weights into.
    """

    recipe: str
    folder: Path
    files: dict[str, bytes]
    network: QuantizedGraph
    piece: fx.GraphModule
    model: nn.Module

    @classmethod
    def make(cls, folder: Path, recipe: str = "w4a4") -> Material:
        """Calibrate and export a network with random weights."""
        torch.manual_seed(0)
        model = create_model(SPEC)
        config = resolve_data_config(model, SPEC, {})
        images = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
        batch = Batch(images, torch.zeros(8, dtype=torch.int64), [str(i) for i in range(8)])
        short = ["calibration_images=8", "observation_images=8", "reconstruction.batch_size=8"]
        loaded = load_recipe(recipe, [*short, "reconstruction.iterations=2", "slicing=block"])
        calibrate(model, SPEC, batch, config, loaded, folder)
        export(folder)
        run = Run.open(folder)
        packaged = Path(sys.modules[load_recipe.__module__].__file__ or "").parent / f"{recipe}.toml"
        shutil.copy(packaged, folder / "recipe.toml")
        torch.save(model.state_dict(), folder / "weights.pt")
        write_tensors(folder / "weights.safetensors", model.state_dict())
        network = run.quantized_graph()
        piece = extract(network.module, run.slices()[0])
        save(folder / SLICE, piece, run.manifest.slices[0])
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        return cls(recipe, folder, files, network, piece, model)

    @property
    def networks(self) -> list[str]:
        """Names of the exported files."""
        return sorted(name for name in self.files if name.endswith(".onnx"))

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
        """Open the run and load its tensors into the network, as the later stages do, and count its codes, as a report does."""
        run = Run.open(self.folder)
        run.manifest.recipe.formats()
        run.unoptimized()
        path = run.file(QUANTIZED_TENSORS)
        tensors, _ = read_tensors(path)
        load_quantizers(self.network, run.manifest.quantizers, tensors, path)
        for bias in self.network.biases.values():
            load_bias(bias, tensors.get(bias.constant), path)
        weight_comparisons(run)


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


def tensor_values(material: Material, random_: random.Random) -> None:
    """Whole tensors with wrong numbers, types or shapes, and a matching hash."""
    path = material.folder / QUANTIZED_TENSORS
    held, header = read_tensors(path)
    write_tensors(path, damage_tensors(held, random_), header)
    material.forge(QUANTIZED_TENSORS)
    material.load()


def scales(material: Material, random_: random.Random) -> None:
    """Damaged scales.json: its hash tells."""
    material.write("scales.json", damage_bytes(material.files["scales.json"], random_))
    material.load()


def slice_checkpoint(material: Material, random_: random.Random) -> None:
    """A damaged checkpoint of a slice, as a resumed calibration reads it."""
    path = material.folder / SLICE
    if random_.random() < 0.5:
        material.write(SLICE, damage_bytes(material.files[SLICE], random_))
    else:
        held, header = read_tensors(path)
        write_tensors(path, damage_tensors(held, random_), header)
    restore(path, material.piece, read_manifest(material.folder).quantizers)


def recipe_bytes(material: Material, random_: random.Random) -> None:
    """A damaged recipe file."""
    path = material.write("recipe.toml", damage_bytes(material.files["recipe.toml"], random_))
    load_recipe(str(path)).formats()


def recipe_override(material: Material, random_: random.Random) -> None:
    """An override with a wrong key or value."""
    key = random_.choice(
        [
            *("weight_bits", "slicing", "reconstruction.iterations", "reconstruction", "a.b.c", "", "."),
            *("weights", "activations", "attention", "ends", "overrides", "overrides.head"),
        ]
    )
    names = ["fp8", "nvfp4", "int4", "int9", "float", '{"[" = "nvfp4"}', '{"*" = "float"}']
    nasty = [str(n) for n in NASTY] + ["[" * random_.choice([1, 5000]), "'", '"""', "1e999"]
    value = random_.choice(names if random_.random() < 0.3 else nasty)
    load_recipe(material.recipe, [f"{key}={value}"]).formats()


def onnx_file(material: Material, random_: random.Random) -> None:
    """A damaged exported file, linted."""
    name = random_.choice(material.networks)
    lint(material.write(name, damage_bytes(material.files[name], random_)))


def exported_file(material: Material, random_: random.Random) -> None:
    """A damaged exported file, half of the time with a matching hash, found and opened as for a validation."""
    name = random_.choice([*material.networks, SCALES])
    material.write(name, damage_bytes(material.files[name], random_))
    if random_.random() < 0.7:
        material.forge(name)
    run = Run.open(material.folder)
    check_origin(run)
    read_proto(run.runnable(QUANTIZED_ONNX))


def weights(material: Material, random_: random.Random) -> None:
    """Damaged weights of the float model, safetensors or a torch file."""
    name = random_.choice(["weights.pt", "weights.safetensors"])
    load_checkpoint(material.model, material.write(name, damage_bytes(material.files[name], random_)))


CASES: list[Case] = [
    *(manifest_bytes, manifest_values, tensors, tensor_values, scales, slice_checkpoint),
    *(recipe_bytes, recipe_override, onnx_file, exported_file, weights),
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


def fuzz(material: Material, seeds: Sequence[int], advance: Callable[[], None]) -> Counter[str]:
    """Run the cases in turn, one per seed; print what failed, and count what came of each."""
    counts: Counter[str] = Counter()
    for place, seed in enumerate(seeds):
        case = CASES[place % len(CASES)]
        outcome = run_case(material, case, seed)
        if outcome not in ("read", "refused"):
            print(f"--- {material.recipe}, {case.__name__}, seed {seed}\n{outcome}")
            outcome = "failed"
        counts[f"{case.__name__} {outcome}"] += 1
        advance()
    return counts


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=10_000, help="of all recipes together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--recipe",
        nargs="+",
        default=RECIPES,
        choices=packaged_recipes(),
        metavar="NAME",
        help="what runs to damage",
    )
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as root, stage_progress() as progress:
        advance = stepper(progress, "fuzz", args.cases)
        for place, recipe in enumerate(args.recipe):
            material = Material.make(Path(root) / recipe / "run", recipe)
            seeds = range(args.seed + place, args.seed + args.cases, len(args.recipe))
            counts += fuzz(material, seeds, advance)
    print("\n".join(f"{name:<28} {count}" for name, count in sorted(counts.items())))
    failures = sum(count for name, count in counts.items() if name.endswith("failed"))
    print(f"{args.cases} cases, {failures} failures")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
