"""What a manifest keeps of the network: what it was made from, and what was taken of its checkpoint."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ospq_export.errors import listed


class ModelSpec(BaseModel):
    """What a network is made from.

    Attributes:
        name: what its source calls it: timm's and torchvision's names, a folder or hub name of transformers, or
            "package.module:function".
        source: `timm`, `torchvision`, `transformers`, `module`, a user's own function, or `object`, what Python was given.
        kwargs: Keyword arguments of the function that builds it; lists become tuples, so that a specification
            read back from JSON equals the one written.
        checkpoint: Path of a weight file, or None.
        checkpoint_key: Which entry or prefix of the file holds the weights; None takes the one that fits.
        pretrained: Whether the source's pretrained weights are used where there is no checkpoint.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    # Without it, it is what files of times with timm alone are.
    source: Literal["timm", "torchvision", "transformers", "module", "object"] = Field(
        default="timm", exclude_if=lambda source: source == "timm"
    )
    kwargs: dict[str, Any] = {}
    checkpoint: str | None = None
    checkpoint_key: str | None = None
    pretrained: bool = False

    @field_validator("kwargs")
    @classmethod
    def _normalize(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {key: plain(value) for key, value in kwargs.items()}


def plain(value: Any) -> Any:
    """`value` with tuples for lists; ValueError where it holds what JSON cannot."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return tuple(plain(item) for item in value)
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: plain(item) for key, item in value.items()}
    raise ValueError(f"{value!r} is neither a number, a string, None nor a list or dictionary of these")


def label_of(entry: str, prefix: str) -> str:
    """What `checkpoint_key` calls a set of weights: entry and prefix, "." for the plain file."""
    return ".".join(part for part in (entry, prefix.rstrip(".")) if part) or "."


class CheckpointRecord(BaseModel):
    """What was taken of a checkpoint file, and what was done to it.

    Attributes:
        entry: where in the file the weights lay, as a dotted path; "" is the file itself.
        prefix: what was stripped from all names.
        chosen: "only" where one set of weights fits, "option" by `checkpoint_key`, "rule" where several fit and timm's rule
            decided: moving averages first.
        others: the other sets that fit too and hold other values.
        aside: tensors of the same entry outside the prefix.
        ignored: surplus tensors without effect in eval mode.
        absent: missing tensors without effect in eval mode.
        differing: ignored tensors that the network computes with other values than the file has.
        adapted: whether timm's checkpoint filter changed names or shapes.
        resized: tensors that the filter resampled to another shape.
        dropped: tensors that the filter merged into others or left out.
        dtypes: floating-point types of the file's weights, without "torch."; all are read as float32.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    entry: str = ""
    prefix: str = ""
    chosen: Literal["only", "option", "rule"] = "only"
    others: list[str] = []
    aside: list[str] = []
    ignored: list[str] = []
    absent: list[str] = []
    differing: list[str] = []
    adapted: bool = False
    resized: list[str] = []
    dropped: list[str] = []
    dtypes: list[str] = []

    def summary(self) -> str:
        """In a line what is worth a word; "" where the file is the network's plain state dictionary."""
        parts = []
        if self.entry:
            parts.append(f"weights taken from {self.entry!r}")
        if self.prefix:
            parts.append(f"prefix {self.prefix!r} stripped")
        if self.others:
            also, taken = ", ".join(map(repr, self.others)), label_of(self.entry, self.prefix)
            parts.append(f"{also} would fit as well as {taken!r}: choose with `checkpoint_key`")
        lists = {
            "left aside": self.aside,
            "ignored, without effect": self.ignored,
            "missing, without effect": self.absent,
            "the network computes other values of": self.differing,
        }
        parts += [f"{what}: {listed(names)}" for what, names in lists.items() if names]
        if self.adapted:
            parts.append("adapted to the network by timm's own checkpoint filter")
            parts += [f"resampled: {listed(self.resized)}"] if self.resized else []
            parts += [f"merged or left out by it: {listed(self.dropped)}"] if self.dropped else []
        return "; ".join(parts)
