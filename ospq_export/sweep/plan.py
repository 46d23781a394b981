"""The plan of a sweep, as a TOML file checked by a schema before any work."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ospq_export.calibrate.reconstruct.store import parse_bytes
from ospq_export.errors import InputError
from ospq_export.recipes.keys import override, read_toml, refusal
from ospq_export.validate.verdict import Thresholds

PAGE = "docs/sweep-plan.md"
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_Size = tuple[int, int]
_M = TypeVar("_M", bound=BaseModel)


class Section(BaseModel):
    """A part of a plan; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Images(Section):
    """Where images are and what is said of their classes; each key as the option of the same name."""

    calibration: str | None = Field(default=None, description="calibration images, as `calibrate` takes them")
    validation: str | None = Field(default=None, description="validation images, as `validate` takes them")
    class_map: str | None = Field(
        default=None, description="file with the classes in the order of the outputs"
    )
    class_order: Literal["plain", "natural"] | None = Field(default=None, description="of class folders")
    class_from: Literal["first", "path"] | None = Field(
        default=None, description="what names the class of an image in nested folders"
    )
    exif: bool | None = Field(default=None, description="whether images are turned as EXIF says")


class Model(Images):
    """A network; keys about images take the place of those in the section `data`."""

    demo: Literal["vit", "swin"] | None = Field(
        default=None, description="a packaged network with its images, in place of all other keys"
    )
    model: str | None = Field(default=None, description="what `calibrate` takes as MODEL")
    model_kwargs: str | dict[str, Any] = Field(default="", description="arguments of the network")
    checkpoint: str | None = Field(default=None, description="file of weights; none: the pretrained ones")
    checkpoint_key: str | None = Field(default=None, description="entry or prefix of the weights in it")
    random_weights: bool = Field(default=False, description="to try the tools out")
    input_size: tuple[int, int, int] | None = Field(default=None, description="channels, height, width")
    mean: tuple[float, ...] | None = Field(default=None, description="per channel, of pixels in 0..1")
    std: tuple[float, ...] | None = Field(default=None, description="per channel")
    crop_pct: float | None = Field(default=None, description="share of the resized image that is kept")
    interpolation: str | None = Field(default=None, description="resampling")
    size_range: tuple[_Size, _Size] | tuple[_Size, _Size, _Size] | None = Field(
        default=None, description="smallest and largest height and width, and their step"
    )
    task: Literal["classify", "embed", "dense", "tensors"] | None = Field(
        default=None, description="what the outputs are"
    )
    outputs: tuple[str, ...] | None = Field(default=None, description="names of those that are kept")


class Validation(Section):
    """How every run is validated."""

    backends: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="executions; none: all that the machine has"
    )
    limit: int | None = Field(
        default=None, ge=1, description="images: a seeded sample with each class's share"
    )
    batch_size: int = Field(default=100, ge=1, description="images per forward pass")
    floor_images: int = Field(default=1000, ge=0, description="images that the noise floor is measured on")
    code_images: int = Field(default=32, ge=0, description="images that codes are compared on")
    decision_threshold: float | None = Field(default=None, description="of networks with one logit")
    pages: bool = Field(
        default=True, description="whether every run gets report.html and report.md beside report.json"
    )
    thresholds: Thresholds = Field(default=Thresholds(), description="what is allowed")


class Resources(Section):
    """What one run is given; a run is scheduled where this is free."""

    cpus: int = Field(default=1, ge=1, description="processors, and threads that compute")
    memory: str | None = Field(default=None, description="host memory, such as 8GB")
    gpus: float = Field(default=0, ge=0, description="GPUs, or a share of one; above 0, runs compute on cuda")
    workers: int = Field(default=0, ge=0, description="processes that decode images; 0: the run itself")
    retries: int = Field(
        default=3, ge=0, description="how often a run is started again whose process or node has died"
    )


class Plan(Section):
    """A sweep: every model with every recipe, every set of overrides and every seed."""

    name: str = Field(default="", description="heading of the tables")
    models: dict[str, Model] = Field(min_length=1, description="networks by name")
    recipes: tuple[str, ...] = Field(min_length=1, description="packaged recipes and TOML files")
    overrides: dict[str, tuple[str, ...]] = Field(
        default={}, description="named lists of KEY=VALUE of the recipes; none: the recipes as they are"
    )
    seeds: tuple[Annotated[int, Field(ge=0, le=2**62)], ...] = Field(
        default=(0,), min_length=1, description="of the choice of calibration images and of what follows"
    )
    nearest: bool = Field(
        default=True, description="whether nearest rounding is measured beside every recipe"
    )
    target: str | None = Field(default=None, description="hardware that has to have all formats")
    fp16: bool = Field(default=False, description="whether the file with FP16 float parts is validated too")
    data: Images = Field(default=Images(), description="images of all models")
    validation: Validation = Field(default=Validation(), description="how runs are validated")
    resources: Resources = Field(default=Resources(), description="what one run is given")


def load_plan(path: Path, overrides: Sequence[str] = ()) -> Plan:
    """Read a plan.

    Args:
        path: a TOML file.
        overrides: "key=value" or "section.key=value", values as TOML literals (bare words are strings).

    Raises:
        InputError: it cannot be read, an unknown key, or a value that the schema refuses.
    """
    values = read_toml(path, "plan")
    for text in overrides:
        override(values, text, "plan")
    models = values.get("models")
    if isinstance(models, dict):
        # One by one: a key of a network is then named like any other, with the nearest valid one.
        values["models"] = {name: _model(name, given, path) for name, given in models.items()}
    plan = _checked(Plan, values, str(path))
    check_labels(plan.models, f"{path}, models")
    check_labels(plan.overrides, f"{path}, overrides")
    if plan.resources.memory is not None:
        parse_bytes(plan.resources.memory, f"{path}, resources.memory")
    return plan


def _model(name: str, given: object, path: Path) -> Model:
    where = f"{path}, models.{name}"
    if not isinstance(given, dict):
        fix = f'write [models.{name}] and model = "NAME" below it'
        raise InputError("a model is a section", where=where, fix=fix)
    model = _checked(Model, given, where)
    others = sorted(given.keys() - {"demo"})
    if model.demo is None and model.model is None:
        raise InputError("nothing says which network it is", where=where, fix='write model = "NAME"')
    if model.demo is not None and others:
        what = f"demo brings everything along, and {', '.join(others)} is given"
        raise InputError(what, where=where, fix="leave one of them out")
    return model


def check_labels(names: Iterable[str], where: str) -> None:
    """Hold names that folders are called after to what any file system takes."""
    for name in names:
        if not _LABEL.fullmatch(name):
            fix = "use letters, digits, dots, dashes and underscores, a letter or a digit first"
            raise InputError(f"{name!r} is no name for a run", where=where, fix=fix)


def _checked(kind: type[_M], values: dict[str, Any], where: str) -> _M:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise refusal(kind, error, where, kind="plan", listed_by=PAGE) from error
