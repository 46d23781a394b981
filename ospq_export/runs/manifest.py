"""The manifest of a run directory: everything about a run that is not a tensor, verified when it is opened."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from ospq_export.data.config import ClassLevel, DataConfig
from ospq_export.errors import InputError, damaged, reason_of, refusal_of
from ospq_export.graph.sizes import SizeRange
from ospq_export.models.record import CheckpointRecord, ModelSpec
from ospq_export.recipes import Recipe
from ospq_export.runs.files import MANIFEST, sha256, write_json

if TYPE_CHECKING:
    from ospq_export.formats.base import Format

SCHEMA_VERSION = 2


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SliceRecord(_Record):
    """One slice (see `graph.slicing.Slice`) and what its reconstruction achieved; errors and warning as in `SliceMetrics`.

    `peak_bytes` is the highest memory use of the process so far: resident on the host, allocated on a GPU; None if unknown.
    """

    index: int
    name: str
    start: str
    end: str
    received: list[str] = []
    carried: list[str] = []
    error_before: float
    error_after: float
    iterations: int
    kept: bool
    seconds: float
    losses: list[float]
    warning: str = ""
    peak_bytes: int | None = None


class CandidateRecord(_Record):
    """A slicing that was tried: where its slices end, and how far the class probabilities were off, trial by trial."""

    name: str
    ends: list[str]
    divergence: list[float]


class SlicingRecord(_Record):
    """How the slicing was found.

    Attributes:
        choice: name of the candidate or granularity that was taken.
        share: cost of the trials over that of the full reconstruction.
        held_out: calibration images that the trials were judged on.
        candidates: all that were tried; empty where the recipe named the slicing.
        dominance: share of the squared norm in the largest 0.1 % of the elements, by cut point.
    """

    choice: str
    share: float = 0.0
    held_out: int = 0
    candidates: list[CandidateRecord] = []
    dominance: dict[str, float] = {}


class QuantizerRecord(_Record):
    """One quantizer; its scale and offset are tensors "<name>.scale" and "<name>.offset".

    `format` is what `Format.record` said; `constant` the float network's constant that a weight quantizer reads.
    """

    name: str
    kind: Literal["activation", "weight"]
    slice: int
    format: dict[str, JsonValue]
    constant: str | None = None

    def read_format(self) -> Format:
        """The format.

        Raises:
            InputError: the record describes none.
        """
        from ospq_export.formats.choice import read

        return read(self.format, weight=self.kind == "weight")


class EqualizedSite(_Record):
    """What equalization did at one site; errors: of the quantized consumers' outputs, over their variance, summed."""

    producer: str
    consumers: list[str]
    choice: str
    error_before: float
    error_after: float
    largest_factor: float


class OutlierRecord(_Record):
    """Outlier statistics of one tensor.

    Attributes:
        name: of the cut point's node, or of the activation quantizer.
        kind: which of the two.
        max_over_std: largest magnitude over the standard deviation.
        kurtosis: fourth central moment over the squared variance; 3 for a normal distribution.
        largest_share: share of the squared norm in the largest 0.1 % of the elements of each batch.
        channel_share: share of the squared norm in the worst 1 % of the channels, at least one.
        largest: largest magnitude; 0 in manifests of before it was recorded.
    """

    name: str
    kind: Literal["cut", "quantizer"]
    max_over_std: float
    kurtosis: float
    largest_share: float
    channel_share: float
    largest: float = 0.0


class CalibrationRecord(_Record):
    """What the run was calibrated on; passed_over and notes as in `data.record.ImagesRecord`.

    Attributes:
        threads: that computed; sums are split among them, so that another number gives other last digits.
        distinct: how many of the images differ from all others.
        float_products: operators that multiply and add but have no quantized form.
        substituted: operators that have not the format of their role, with the reason.
        outputs_left_out: what the network returns besides its outputs, with the reason.
        weights_sha256: of the network's constants before equalization; None in runs of before it was recorded.
    """

    images: int
    images_sha256: str
    skipped: list[str]
    seed: int
    device: str
    processes: int = 1
    threads: int | None = None
    passed_over: dict[str, int] = {}
    notes: dict[str, int] = {}
    distinct: int | None = None
    float_products: list[str] = []
    substituted: dict[str, str] = {}
    outputs_left_out: dict[str, str] = {}
    weights_sha256: str | None = None


class Manifest(_Record):
    """Everything about a run that is not a tensor.

    Attributes:
        size_range: heights and widths that the network takes besides `data`'s; None where it takes that one only.
        classes_source: where the order of the classes is from; None in older runs, like the next two.
        class_from: how nested folders are read.
        outputs: how many values the classifier's output has; None for other tasks.
        files: SHA-256 of every file beside this one.
    """

    schema_version: int = SCHEMA_VERSION
    status: Literal["calibrating", "calibrated"]
    model: ModelSpec
    data: DataConfig
    size_range: SizeRange | None = Field(default=None, exclude_if=lambda sizes: sizes is None)
    class_to_idx: dict[str, int]
    classes_source: str | None = None
    class_from: ClassLevel | None = None
    outputs: int | None = None
    recipe: Recipe
    task: Literal["classify", "embed", "dense", "tensors"] = "classify"
    graph_fingerprint: str
    calibration: CalibrationRecord
    checkpoint: CheckpointRecord | None = None
    slicing: SlicingRecord | None = None
    equalized: list[EqualizedSite] = []
    profile: list[OutlierRecord] = []
    slices: list[SliceRecord] = []
    quantizers: list[QuantizerRecord] = []
    versions: dict[str, str]
    files: dict[str, str]

    def formats(self) -> dict[str, Format]:
        """The format of every quantizer, by its name.

        Raises:
            InputError: a record describes none.
        """
        return {record.name: record.read_format() for record in self.quantizers}

    def identity(self) -> dict[str, object]:
        """What must not change between an interrupted run and its continuation."""
        dumped = self.model_dump(mode="json")
        keys = (
            "model",
            "data",
            "size_range",
            "task",
            "class_to_idx",
            "recipe",
            "graph_fingerprint",
            "calibration",
            "versions",
        )
        result = {key: dumped.get(key) for key in keys}
        # Neither the threads nor a file that is no image tell one run from another.
        aside = {
            "calibration": ("threads", "passed_over", "notes", "weights_sha256"),
            "model": ("checkpoint", "checkpoint_key"),
        }
        for key, left in aside.items():
            result[key] = {k: v for k, v in dumped[key].items() if k not in left}
        result["weights"] = self.calibration.weights_sha256
        return result


def installed_versions() -> dict[str, str]:
    """Versions of this package and of what its numbers depend on."""
    names = ("ospq-export", "torch", "timm", "onnx", "numpy")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest atomically."""
    write_json(folder / MANIFEST, manifest.model_dump(mode="json"))


def read_manifest(folder: Path) -> Manifest:
    """Read and check a manifest.

    Raises:
        InputError: not a run directory, damaged, or of another schema version.
    """
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            "not a run directory: it has no manifest.json",
            where=folder,
            fix="give a folder that `calibrate` wrote",
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(f"the manifest cannot be read: {reason_of(error)}", path) from error
    version = values.get("schema_version") if isinstance(values, dict) else None
    if version != SCHEMA_VERSION:
        raise InputError(
            f"the manifest has schema version {version}, this program reads {SCHEMA_VERSION}",
            where=path,
            fix=_again(values),
        )
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        key = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise damaged(f"the manifest's {key!r} is wrong: {refusal_of(error.errors()[0])}", path) from error


def _again(values: object) -> str:
    """The command that makes a run of another version anew."""
    held = values if isinstance(values, dict) else {}
    model, recipe = (held.get(key) for key in ("model", "recipe"))
    name, chosen = (v.get("name") if isinstance(v, dict) else None for v in (model, recipe))
    return f"make it anew: ospq-export calibrate {name or 'MODEL'} `data` DIR `out` NEW `recipe` {chosen or 'RECIPE'}"


def check_files(folder: Path, manifest: Manifest) -> None:
    """Compare every file the manifest names with its hash.

    Raises:
        InputError: a file is missing or was changed.
    """
    for name, expected in manifest.files.items():
        path = folder / name
        if Path(name).name != name:
            raise damaged(f"the manifest names a file outside the run directory: {name!r}", folder)
        if not path.is_file():
            raise damaged(f"the run directory lacks {name}", folder)
        if sha256(path) != expected:
            raise damaged(f"{name} was changed or truncated since it was written: its hash differs", folder)


def record_files(folder: Path, manifest: Manifest, *names: str) -> Manifest:
    """Add files to the manifest with their present hashes, and write it."""
    files = {**manifest.files, **{name: sha256(folder / name) for name in names}}
    updated = manifest.model_copy(update={"files": files})
    write_manifest(folder, updated)
    return updated
