"""Options and helpers that several commands share."""

from __future__ import annotations

import functools
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ospq_export.engines.rates import GPUS
from ospq_export.engines.targets import TARGETS, check_formats, find_target
from ospq_export.errors import InputError, refusal_of

if TYPE_CHECKING:
    from rich.console import Console

    from ospq_export.data import ClassChoice
    from ospq_export.models.record import ModelSpec
    from ospq_export.recipes import Recipe
    from ospq_export.validate.verdict import Thresholds

_WIDE = 160
_DATA = (
    "Images: a folder with one sub-folder per class; a list of path,label (.csv, .tsv, .txt); .tar or Parquet files "
    "(one, a folder of them, a glob, shard-{000..009}.tar); .npz or .npy; hfds:NAME[:split]; a compressed tar file, a pipe, "
    "- for standard input, or hfids:NAME[:split], which are read once."
)
DataOption = Annotated[str, typer.Option(help=_DATA)]
GivenDataOption = Annotated[str | None, typer.Option(help=_DATA)]
PackedDataOption = Annotated[str | None, typer.Option(help="With --bundle: images, as validate takes them.")]
DeviceOption = Annotated[str, typer.Option(help="torch device: cpu, cuda, cuda:1, ...")]
SeedOption = Annotated[int, typer.Option(min=0, max=2**62, help="Seed of every random choice.")]
WorkersOption = Annotated[
    int, typer.Option(min=0, help="Processes that decode images; 0 decodes in this one.")
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        help="Threads that compute. Default: OMP_NUM_THREADS, else the cores that affinity and CPU quota allow."
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
ModelArgument = Annotated[
    str,
    typer.Argument(
        help="timm's name of a model, e.g. deit_tiny_patch16_224, hf-hub:ORG/NAME or local-dir:PATH; or torchvision:NAME, "
        "transformers:PATH or a name of its hub, module:package.module:function (runs your code)."
    ),
]
ModelKwargsOption = Annotated[
    str, typer.Option(help="Model arguments as one string, 'img_size=112 num_classes=10'.")
]
CheckpointOption = Annotated[
    Path | None,
    typer.Option(help="Weights: safetensors, or a torch file. Default: the source's pretrained ones."),
]
CheckpointKeyOption = Annotated[
    str | None,
    typer.Option(
        help="Entry or prefix of the weights in --checkpoint, e.g. state_dict_ema. Default: what fits; of several, EMA."
    ),
]
RandomWeightsOption = Annotated[bool, typer.Option(help="Use seeded random weights, to try the tools out.")]
InputSizeOption = Annotated[str | None, typer.Option(help="Channels, height, width: '3,224,224'.")]
SizeRangeOption = Annotated[
    str | None,
    typer.Option(
        help="Smallest and largest height x width that the network is to take, '64x64:256x256'; --input-size lies between. "
        "A third one is what they are multiples of. Default: one size."
    ),
]
MeanOption = Annotated[str | None, typer.Option(help="Mean per channel: '0.485,0.456,0.406'.")]
StdOption = Annotated[str | None, typer.Option(help="Standard deviation per channel.")]
CropPctOption = Annotated[float | None, typer.Option(help="Share of the resized image that the crop keeps.")]
InterpolationOption = Annotated[str | None, typer.Option(help="Resampling: bicubic, bilinear, nearest, ...")]
ExifOption = Annotated[
    bool, typer.Option("--exif", help="Turn images as their EXIF orientation says; timm does not.")
]
ClassMapOption = Annotated[
    Path | None,
    typer.Option(
        help="The classes in the order of the network's outputs: JSON, or text with one name a line."
    ),
]
ClassOrderOption = Annotated[
    Literal["plain", "natural"] | None,
    typer.Option(help="Order that class folders are numbered in: plain is torchvision's, natural is timm's."),
]
ClassFromOption = Annotated[
    Literal["first", "path"] | None,
    typer.Option(
        help="Class of an image in nested folders: the first level below --data, or the whole path."
    ),
]
TaskOption = Annotated[
    Literal["classify", "embed", "dense", "tensors"] | None,
    typer.Option(
        help="What the outputs are: logits of an image, a feature vector, logits of every pixel, or any tensors. "
        "Default: what they look like."
    ),
]
OutputsOption = Annotated[
    list[str] | None,
    typer.Option("--output", help="Output to keep; repeat for several. Default: all that hold real numbers."),
]
RunArgument = Annotated[Path, typer.Argument(help="Run directory that `calibrate` wrote.")]
RecipeOption = Annotated[
    str,
    typer.Option(
        help="Packaged recipe (w8a8, w6a6, w4a8, w4a4, fp8, nvfp4, paper-w4a4; see recipe list) or a TOML file."
    ),
]
TargetOption = Annotated[
    str | None,
    typer.Option(
        help=f"Hardware that has to have all formats: {', '.join(TARGETS)}; or a GPU of it: {', '.join(GPUS)}."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON in place of text.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a recipe value, e.g. reconstruction.iterations=2000."
    ),
]


def check_recipe(recipe: Recipe, target: str | None) -> None:
    """Refuse a recipe with formats that the target does not have.

    Raises:
        InputError: it has one, or there is no such target.
    """
    if target is not None:
        check_formats(find_target(target), recipe.formats().formats())


def model_spec(
    name: str,
    kwargs: str,
    checkpoint: Path | None,
    random_weights: bool,
    checkpoint_key: str | None = None,
) -> ModelSpec:
    """The model that the command line names.

    Raises:
        InputError: the keyword arguments cannot be read.
    """
    from ospq_export.models.record import ModelSpec
    from ospq_export.models.sources import split_name
    from ospq_export.models.timm import parse_model_kwargs

    source, name = split_name(name)
    return ModelSpec(
        name=name,
        source=source,
        kwargs=parse_model_kwargs(kwargs),
        checkpoint=None if checkpoint is None else str(checkpoint),
        checkpoint_key=checkpoint_key,
        pretrained=checkpoint is None and not random_weights,
    )


def data_settings(
    input_size: str | None,
    mean: str | None,
    std: str | None,
    crop_pct: float | None,
    interpolation: str | None,
    exif: bool = False,
) -> dict[str, Any]:
    """What the command line says of the preprocessing; what it leaves out is the model's own.

    Raises:
        InputError: a list of numbers cannot be read.
    """
    settings = {
        "input_size": _numbers(input_size, "--input-size", int, "3,224,224"),
        "mean": _numbers(mean, "--mean", float),
        "std": _numbers(std, "--std", float),
        "crop_pct": crop_pct,
        "interpolation": interpolation,
        "exif": exif or None,
    }
    return {key: value for key, value in settings.items() if value is not None}


def size_bounds(text: str | None) -> list[tuple[int, ...]] | None:
    """The smallest and the largest height and width, and their step where it is given.

    Raises:
        InputError: it cannot be read.
    """
    if text is None:
        return None
    if not re.fullmatch(r"\d+x\d+(:\d+x\d+){1,2}", text):
        fix = "write it like 64x64:256x256"
        raise InputError(f"{text!r} is no range of heights and widths", where="--size-range", fix=fix)
    return [tuple(map(int, size.split("x"))) for size in text.split(":")]


def class_choice(
    class_map: Path | None,
    class_order: Literal["plain", "natural"] | None,
    class_from: Literal["first", "path"] | None,
) -> ClassChoice:
    """What the command line says of the classes.

    Raises:
        InputError: both a map and an order are given, or the map cannot be read.
    """
    from ospq_export.data import ClassChoice
    from ospq_export.data.class_map import read_class_map

    if class_map is not None:
        # Before any work, and again where it is used.
        read_class_map(class_map)
    return ClassChoice(class_map, class_order, class_from)


def _numbers(text: str | None, option: str, kind: type, like: str = "0.5,0.5,0.5") -> tuple[Any, ...] | None:
    if text is None:
        return None
    try:
        numbers = tuple(kind(part) for part in text.replace(",", " ").split())
        if not numbers:
            raise ValueError
        return numbers
    except ValueError as error:
        raise InputError(
            f"{text!r} is not a list of numbers", where=option, fix=f"write it like {like}"
        ) from error


@functools.cache
def batch_sizes(text: str | None) -> list[int]:
    """Batch sizes such as "1,8,32"; none where nothing is given.

    Raises:
        InputError: one is no whole number above 0.
    """
    sizes = _numbers(text, "--latency", int, "1,8,32") or ()
    if any(size < 1 for size in sizes):
        raise InputError(f"a batch of {min(sizes)}", where=f"--latency {text}", fix="give sizes above 0")
    return list(dict.fromkeys(sizes))


def limits_of(**values: float | None) -> Thresholds:
    """What is allowed; options that were not given keep their defaults.

    Raises:
        InputError: a value is impossible.
    """
    from pydantic import ValidationError

    from ospq_export.validate.verdict import Thresholds

    try:
        return Thresholds.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        option = f"--{str(first['loc'][0]).replace('_', '-')}"
        where = f"{option} {first['input']}"
        raise InputError("the value is not possible", where=where, fix=refusal_of(first)) from error


def _options() -> dict[str, str]:
    """What each setting is called on the command line, by its name in Python."""
    from ospq_export.cli.app import app

    group = typer.main.get_command(app)
    parameters = (p for command in group.commands.values() for p in command.params)  # type: ignore[attr-defined]
    return {p.name: max(p.opts, key=len) for p in parameters if p.opts[0].startswith("-")}


def with_options(text: str) -> str:
    """A message of the library with options in place of settings in backquotes."""
    return re.sub(r"`(\w+)`", lambda found: _options().get(found[1], found[0]), text)


def say(line: str) -> None:
    """A line of results as it is: paths and names may hold brackets, and a path that is broken in two cannot be copied."""
    console().print(line, markup=False, highlight=False, soft_wrap=True)


def console() -> Console:
    """Where results go: standard output; where that is no terminal, names in tables are not cut."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else _WIDE)


def say_json(values: object) -> None:
    """Values as JSON, for programs to read."""
    typer.echo(json.dumps(values, indent=2))
