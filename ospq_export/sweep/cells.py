"""What a plan comes to: its cells, each of them one run that needs nothing else to be known."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ospq_export.data.choice import ClassChoice
from ospq_export.data.class_map import read_class_map
from ospq_export.data.door import several
from ospq_export.data.huggingface import MAPPED, STREAMED
from ospq_export.data.pipes import STANDARD_INPUT
from ospq_export.engines.targets import check_formats, find_target
from ospq_export.errors import InputError
from ospq_export.models.record import ModelSpec
from ospq_export.models.sources import split_name
from ospq_export.models.timm import parse_model_kwargs
from ospq_export.recipes import Recipe, load_recipe
from ospq_export.sweep.plan import Images, Model, Plan, Section, Validation, check_labels
from ospq_export.validate.executions.chosen import named_executions

_PATHS = ("local-dir", "transformers")
# What is left of a calibration: ranges are searched, every weight goes to the nearest code.
_NEAREST = [
    "slicing=block",
    "equalization=none",
    "reconstruction.iterations=0",
    "reconstruction.refinement_images=0",
    "reconstruction.bias_correction=false",
    "reconstruction.loss=normalized",
]


class Cell(Section):
    """One run of a sweep.

    Attributes:
        name: of its run directory.
        model: of the plan's models.
        recipe: as the tables call it.
        overrides: of the plan's sets; "" where it has none.
        seed: of every random choice.
        nearest: whether it rounds to nearest, for the column beside others.
        beside: name of the cell that rounds the same formats to nearest; "" where nobody asked for it.
        network: what is quantized, with its images.
        settings: the recipe with its overrides.
        validation: how it is validated.
        fp16: whether the FP16 file is exported and validated too.
    """

    name: str
    model: str
    recipe: str
    overrides: str
    seed: int
    nearest: bool = False
    beside: str = ""
    network: Model
    settings: Recipe
    validation: Validation
    fp16: bool

    def identity(self) -> dict[str, Any]:
        """What must not change between a finished run and a plan that names it."""
        return self.model_dump(mode="json", exclude={"beside"})


def cells_of(plan: Plan) -> list[Cell]:
    """All cells, seeds outermost, so that an unfinished sweep is a whole one of fewer seeds; those that round to nearest last.

    Raises:
        InputError: a recipe, an override, a file or an execution that the plan names is not there.
    """
    named_executions(plan.validation.backends, _float_type(plan.fp16))
    networks = {name: _resolved(name, model, plan.data) for name, model in plan.models.items()}
    recipes = list(_recipes(plan))
    cells, plain = list[Cell](), dict[str, Cell]()
    for seed, (model, network), (recipe, overrides, settings) in itertools.product(
        plan.seeds, networks.items(), recipes
    ):
        name = "-".join(filter(None, (model, recipe, overrides, f"s{seed}")))
        common: dict[str, Any] = {"validation": plan.validation, "fp16": plan.fp16, "network": network}
        common |= {"model": model, "recipe": recipe, "overrides": overrides, "seed": seed}
        beside = ""
        if plan.nearest:
            rounded = nearest(settings)
            key = f"{model} {seed} {rounded.model_dump_json(exclude={'name', 'description'})}"
            plain.setdefault(key, Cell(name=f"{name}-nearest", settings=rounded, nearest=True, **common))
            beside = plain[key].name
        cells.append(Cell(name=name, settings=settings, beside=beside, **common))
    _check_names([*cells, *plain.values()])
    return [*cells, *plain.values()]


def _float_type(fp16: bool) -> str:
    return "fp16" if fp16 else "fp32"


def nearest(recipe: Recipe) -> Recipe:
    """The recipe's formats on the recipe's images, without anything that learns."""
    rest = load_recipe("w8a8", _NEAREST)
    kept = {"slicing", "equalization", "reconstruction", "pilot"}
    update = {key: getattr(rest, key) for key in kept}
    said = f"The formats of {recipe.name}, rounded to nearest."
    return recipe.model_copy(update=update | {"name": f"{recipe.name}-nearest", "description": said})


def _recipes(plan: Plan) -> Iterator[tuple[str, str, Recipe]]:
    """(label, name of the overrides, recipe with them)."""
    target = None if plan.target is None else find_target(plan.target)
    for name, (label, overrides) in itertools.product(plan.recipes, (plan.overrides or {"": ()}).items()):
        try:
            recipe = load_recipe(name, overrides)
            choice = recipe.formats()
            if target is not None:
                check_formats(target, choice.formats())
        except InputError as error:
            # Its overrides are the plan's, not those of the command line.
            said = str(error).replace("`overrides`", "overrides")
            raise InputError(said, where=f"recipes {name}" + (label and f", overrides.{label}")) from error
        shown = Path(name).stem if Path(name).suffix else name
        check_labels([shown], "recipes")
        yield shown, label, recipe


def _resolved(name: str, model: Model, shared: Images) -> Model:
    """The network with the images of the whole plan where it has none of its own, and with paths that hold anywhere."""
    if model.demo is not None:
        return model
    where = f"models.{name}"
    own = {key: getattr(model, key) for key in Images.model_fields}
    images = {key: getattr(shared, key) if value is None else value for key, value in own.items()}
    for key in ("calibration", "validation"):
        images[key] = _images(images[key], f"{where}.{key}", f"data.{key}")
    for key, found in (("class_map", images["class_map"]), ("checkpoint", model.checkpoint)):
        if found is not None and not Path(found).is_file():
            raise InputError("there is no such file", where=f"{where}.{key} {found}", fix="give its path")
    if images["class_map"] is not None:
        read_class_map(Path(images["class_map"]))
        images["class_map"] = str(Path(images["class_map"]).absolute())
    choice_of(model.model_copy(update=images))
    checkpoint = None if model.checkpoint is None else str(Path(model.checkpoint).absolute())
    return model.model_copy(update={**images, "checkpoint": checkpoint, **_built(model)})


def _built(model: Model) -> dict[str, Any]:
    given = model.model_kwargs
    kwargs = parse_model_kwargs(given) if isinstance(given, str) else given
    prefix, _, path = str(model.model).partition(":")
    local = prefix in _PATHS and Path(path).exists()
    return {
        "model_kwargs": kwargs,
        "model": f"{prefix}:{Path(path).absolute()}" if local else model.model,
    }


def _images(text: str | None, where: str, shared: str) -> str:
    """Images that every run of the sweep can open, wherever it runs."""
    if text is None:
        raise InputError("nothing says where the images are", where=where, fix=f"write it, or {shared}")
    if text.startswith((MAPPED, STREAMED)):
        return text
    path = Path(text)
    if text == STANDARD_INPUT or path.is_fifo():
        fix = "write the images to files"
        raise InputError(
            "a pipe is read once, and every run reads the images", where=f"{where} {text}", fix=fix
        )
    if not path.exists():
        try:
            several(text)
        except InputError as error:
            raise InputError(str(error), where=where) from error
    # A glob or a range is a path, too.
    return str(path.absolute())


def _check_names(cells: list[Cell]) -> None:
    counted = Counter(cell.name for cell in cells)
    twice = [name for name, count in counted.items() if count > 1]
    if twice:
        fix = "name models, recipes and overrides differently, and give each seed once"
        raise InputError("two runs have the same name", where=twice[0], fix=fix)


def spec_of(network: Model) -> ModelSpec:
    """What the network is made from; of a packaged one, see `demo.demo_spec`."""
    source, name = split_name(str(network.model))
    return ModelSpec.model_validate(
        {
            "name": name,
            "source": source,
            "kwargs": network.model_kwargs,
            "checkpoint": network.checkpoint,
            "checkpoint_key": network.checkpoint_key,
            "pretrained": network.checkpoint is None and not network.random_weights,
        }
    )


def choice_of(network: Model) -> ClassChoice:
    """What is said of the classes.

    Raises:
        InputError: both a map and an order are given.
    """
    map_file = None if network.class_map is None else Path(network.class_map)
    return ClassChoice(map_file, network.class_order, network.class_from)
