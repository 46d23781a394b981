"""Recipes: what a calibration does, as readable TOML files checked by a schema.

A recipe is found by name among the packaged ones ("w4a4") or by the path of a file; any value can be overridden by
`section.key=value`. Imports formats and errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ospq_export.errors import InputError
from ospq_export.recipes.keys import override, parse_toml, read_toml, refusal

if TYPE_CHECKING:
    from ospq_export.formats.choice import Choice

_BITS = {"weights": "weight_bits", "activations": "activation_bits", "ends": "first_last_bits"}
_GRANULARITY = r"^(auto|layer|atom|block|blocks:[1-9]\d*|stage|model)$"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SquaredLoss(_Section):
    """Squared error: plain ("normalized"), per channel over its variance, or as BRECQ's code sums it, to the letter."""

    kind: Literal["normalized", "channel", "literal"]


class FisherLoss(_Section):
    """Squared error weighed by Fisher information."""

    kind: Literal["fisher"]
    temperature: float = Field(
        default=4.0,
        gt=0,
        description="by which the logits are divided before the information is taken; above 1, a few unsure images "
        "no longer make up nearly all of it",
    )


Loss = Annotated[
    SquaredLoss | FisherLoss,
    Field(discriminator="kind"),
    BeforeValidator(lambda value: {"kind": value} if isinstance(value, str) else value),
]


class Reconstruction(_Section):
    """Settings of the optimisation of one slice."""

    iterations: int = Field(
        ge=0, description="optimisation steps per slice; 0, and no refinement, is round to nearest"
    )
    batch_size: int = Field(ge=1, description="images per step")
    refinement_images: int = Field(
        ge=0,
        description="images on which each searched scale is first refined by the slice's output error; 0: not at all",
    )
    compensation_images: int = Field(
        default=0,
        ge=0,
        description="calibration images on which weights are fitted to quantized inputs before they are learned; 0 is none",
    )
    learning_rate_rounding: float = Field(gt=0, description="Adam's rate on the rounding parameter V")
    learning_rate_scale: float = Field(ge=0, description="Adam's rate on the activation scales, cosine decay")
    scale_parametrization: Literal["linear", "logarithmic"] = Field(
        description="what the rate above applies to"
    )
    loss: Loss = Field(
        description="what a slice is optimised for, by its kind; a bare word is a kind with its defaults"
    )
    final_loss: Literal["same", "kl"] = Field(
        description="loss of the last slice: the same, or KL divergence of the logits"
    )
    rounding_weight: float = Field(
        ge=0, description="weight of the rounding regulariser (per mean, or literal: per sum)"
    )
    warm_up: float = Field(ge=0, lt=1, description="share of the iterations without the rounding term")
    beta_start: float = Field(gt=0, description="exponent of the rounding term after warm-up")
    beta_end: float = Field(gt=0, description="exponent of the rounding term at the end")
    learn_offsets: bool = Field(description="whether the offsets of `shifted` grids are learned too")
    bias_correction: bool = Field(description="whether biases take over what is shifted on average")
    bias_images: int = Field(ge=1, description="calibration images that the bias correction looks at")
    drop_probability: float = Field(ge=0, le=1, description="share of activation elements left float (QDrop)")
    precision: Literal["float32", "tf32", "bf16"] = Field(
        default="float32", description="of the factors of matrix products while learning; all else is float32"
    )


class Pilot(_Section):
    """How `slicing = "auto"` finds the granularity: by short trial reconstructions."""

    budget: float = Field(gt=0, le=1, description="cost of all trials, as a share of the full reconstruction")
    held_out: int = Field(
        ge=1, description="least calibration images the trials are judged on, at most half of all"
    )


class Recipe(_Section):
    """A whole calibration recipe."""

    name: str = Field(description="in reports")
    description: str = Field(default="", description="in a sentence")
    weight_bits: int | None = Field(default=None, ge=2, le=8, description="integers, in place of weights")
    activation_bits: int | None = Field(default=None, ge=2, le=8, description="in place of activations")
    first_last_bits: int | None = Field(
        default=None, ge=2, le=8, description="of the first and last quantizable operator, in place of ends"
    )
    weights: str | None = Field(
        default=None, description="number format, or float; None: integers of weight_bits"
    )
    activations: str | None = Field(default=None, description="None: integers of activation_bits")
    attention: str | None = Field(
        default=None, description="of products of two activations; None: that of activations"
    )
    ends: str | None = Field(
        default=None,
        description="of the first and last quantizable operator; None: integers of first_last_bits",
    )
    overrides: dict[str, str] = Field(
        default={}, description="formats by patterns of operator names; the last one that fits counts"
    )
    slicing: Annotated[str, Field(pattern=_GRANULARITY)] | tuple[str, ...] = Field(
        description="auto, layer, atom, block, blocks:N, stage, model, or a list of cut points: the reconstruction granularity"
    )
    equalization: Literal["none", "center", "smooth", "shift", "repq"] = Field(
        description="what is moved out of activations beforehand: what softmax cancels of keys, factors, factors and shifts, "
        "or RepQ-ViT's form"
    )
    max_drop: float | None = Field(
        default=None,
        ge=0,
        le=100,
        exclude_if=lambda drop: drop is None,
        description="points that the network may lose; what `validate` allows where it is not told",
    )
    calibration_images: int = Field(ge=1, description="on which everything is chosen and learned")
    observation_images: int = Field(ge=1, description="how many of them the range search looks at")
    reconstruction: Reconstruction
    pilot: Pilot

    @model_validator(mode="after")
    def _complete(self) -> Recipe:
        for name, bits in _BITS.items():
            if getattr(self, name) is None and getattr(self, bits) is None:
                raise ValueError(f"{name} has to be given, or {bits}")
        return self

    def formats(self) -> Choice:
        """The formats of the operators.

        Raises:
            InputError: there is no format of a name, or two do not go together.
        """
        from ospq_export.formats.choice import Choice

        weight, activation, end = (
            getattr(self, name) or f"int{getattr(self, bits)}" for name, bits in _BITS.items()
        )
        overrides = tuple(self.overrides.items())
        choice = Choice(weight, activation, self.attention or activation, end, overrides)
        choice.check()
        return choice

    def named_formats(self) -> dict[str, str]:
        """What the recipe says of formats, as it says it: bits, or names."""
        keys = [key for pair in _BITS.items() for key in pair] + ["attention"]
        return {key: str(getattr(self, key)) for key in keys if getattr(self, key) is not None}

    def summary(self) -> str:
        """Weights and activations in short: "W4A8", or the formats' names."""
        choice = self.formats()
        short = [name.removeprefix("int") for name in (choice.weight, choice.activation)]
        if all(part.isdigit() for part in short):
            return "W{}A{}".format(*short)
        return (
            choice.weight if choice.weight == choice.activation else f"{choice.weight}, {choice.activation}"
        )


def packaged_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    files = resources.files(__package__).iterdir()
    return sorted(f.name.removesuffix(".toml") for f in files if f.name.endswith(".toml"))


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        name_or_path: a packaged recipe's name or a TOML file.
        overrides: "key=value" or "section.key=value", values as TOML literals (bare words are strings).

    Raises:
        InputError: no such recipe, not TOML, an unknown key, or a value that the schema refuses.
    """
    values = _read(name_or_path)
    for text in overrides:
        override(values, text)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise refusal(Recipe, error, name_or_path) from error


def _read(name_or_path: str) -> dict[str, Any]:
    if name_or_path in packaged_recipes():
        text = resources.files(__package__).joinpath(f"{name_or_path}.toml").read_text(encoding="utf-8")
        return parse_toml(text, name_or_path)
    if Path(name_or_path).is_file():
        return read_toml(Path(name_or_path))
    known = ", ".join(packaged_recipes())
    raise InputError(
        f"there is no recipe {name_or_path!r}", fix=f"use one of {known}, or the path of a TOML file"
    )
