"""The three stages from Python, with any module and any images.

from ospq_export import Run

run = Run.calibrate(model, images, recipe="w8a8", out="runs/mine")
run.export(fp16=True)
report = run.validate(others)
assert report, report.verdict.text
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rich.progress import Progress

from ospq_export.calibrate.checkpoints import Events, no_events
from ospq_export.calibrate.reconstruct.store import parse_bytes
from ospq_export.data import ClassChoice, Classes, DataConfig, ImageSet, StreamSet, image_set, open_source
from ospq_export.data.config import unknown_preprocessing
from ospq_export.data.tensors import TensorSet, first_size
from ospq_export.deploy import BUNDLE_IMAGES, bundle, report_device, serve
from ospq_export.errors import InputError
from ospq_export.export.jobs import Extras
from ospq_export.models.record import ModelSpec
from ospq_export.progress import stage_progress
from ospq_export.recipes import Recipe, load_recipe
from ospq_export.runs.allocation import Budget
from ospq_export.runs.run import Run as StoredRun
from ospq_export.validate.preflight import images_of
from ospq_export.validate.report.model import Report
from ospq_export.validate.verdict import Thresholds
from ospq_export.world.processes import joined

if TYPE_CHECKING:
    from torch import nn

Data = str | Path | ImageSet | StreamSet | Iterable[Any]
"""A folder or whatever else the command line takes, or an iterable of tensors; see `data.tensors.TensorSet`."""


@dataclass(frozen=True)
class Session:
    """How work is done, as opposed to what is computed.

    Processes are those that torchrun has started; each of them makes the same calls.

    Attributes:
        device: torch device.
        seed: of every random choice.
        progress: whether bars are shown on standard error.
        events: told what happens during a calibration; see `calibrate.checkpoints.json_lines`.
        memory_budget: host memory for cached activations, "8GB"; None takes half of what is free.
        workers: processes that decode image files.
    """

    device: str = "cpu"
    seed: int = 0
    progress: bool = False
    events: Events = no_events
    memory_budget: str | None = None
    workers: int = 0

    @contextmanager
    def bars(self, here: bool = True) -> Iterator[Progress | None]:
        """Progress bars; None where none are wanted, or not in this process."""
        with stage_progress(disable=not (self.progress and here)) as progress:
            yield progress if self.progress else None


class Run(StoredRun):
    """A run directory, and the stages that write it and read it."""

    @classmethod
    def calibrate(
        cls,
        model: nn.Module,
        data: Data,
        recipe: str | Path | Recipe = "w8a8",
        out: str | Path = "runs/run",
        *,
        overrides: Sequence[str] = (),
        task: str | None = None,
        outputs: Sequence[str] | None = None,
        size_range: Sequence[Sequence[int]] | None = None,
        preprocessing: DataConfig | None = None,
        classes: Sequence[str] = (),
        name: str | ModelSpec | None = None,
        budget: Budget | None = None,
        session: Session | None = None,
    ) -> Self:
        """Quantize a module and write a run directory; interrupted, the same call goes on where it was.

        Args:
            model: in eval mode, float32, of one image tensor (B, C, H, W); whatever `torch.export` captures.
            data: calibration images, of which the recipe takes as many as it wants: the first tensors, or files at random.
            recipe: a packaged one by name, a TOML file, or an object.
            out: the run directory; new, empty, or left by an interruption of the same call.
            overrides: "key=value" of the recipe.
            task: "classify", "embed", "dense" or "tensors"; None takes what the outputs look like, and says so.
            outputs: names of the outputs that are kept; None keeps all that hold real numbers.
            size_range: the smallest and the largest (height, width) that the network is to take, ((64, 64), (256, 256)); the size
                of the images lies between. None: only that one.
            preprocessing: what the tensors have had, or image files are to have; kept with the run. Files need one.
            classes: names of the classes in the order of the network's outputs.
            name: of the model, in reports, or what it was made from, where `models.sources` made it; None takes its class.
            budget: what may be lost or spent; the formats of the operators are then searched, not the recipe's.
            session: device, seed, progress.

        Raises:
            BudgetError: no formats keep the budget.
            InputError: anything that the stage refuses, see `calibrate.stage.calibrate`, or images that are not alike.
        """
        from ospq_export.calibrate.allocate.stage import calibrate_within, images_for, split
        from ospq_export.calibrate.stage import calibrate

        how = session or Session()
        chosen = recipe if isinstance(recipe, Recipe) else load_recipe(str(recipe), list(overrides))
        images = _images(data, preprocessing, classes)
        sample = images.sample(images_for(budget, chosen), how.seed, how.workers)
        stage: Callable[..., StoredRun] = calibrate
        if budget is not None:
            sample, held_out, chosen = split(sample, budget, chosen)
            stage = functools.partial(calibrate_within, held_out=held_out, budget=budget)
        spec = name
        if not isinstance(spec, ModelSpec):
            spec = ModelSpec(name=name or type(model).__name__, source="object")
        with how.bars() as progress:
            run = stage(
                model,
                spec,
                sample,
                images.config,
                chosen,
                Path(out),
                task=task,
                outputs=outputs,
                size_range=size_range,
                class_to_idx=images.class_to_idx,
                skipped=images.skipped,
                origin=images.record,
                device=how.device,
                seed=how.seed,
                progress=progress,
                memory_budget=None if how.memory_budget is None else parse_bytes(how.memory_budget),
                events=how.events,
            )
        return cls(run.path, run.manifest)

    def export(
        self,
        *,
        batch_size: int | None = None,
        extras: Extras | None = None,
        fp16: bool = False,
        opset: int | None = None,
        overwrite: bool = False,
        session: Session | None = None,
    ) -> Self:
        """Write model.onnx, model_fp32.onnx, scales.json and what else is asked for into the run directory.

        Args:
            batch_size: a fixed one; None is dynamic.
            extras: further files.
            fp16: also the files with FP16 float parts, which engines are built from.
            opset: of ONNX's operators; None is 20, or what the formats need.
            overwrite: whether files of an earlier export are replaced; else those that are there stay, and the rest is added.
            session: progress.

        Returns:
            This run, with the new files.

        Raises:
            InputError: see `export.stage.export`.
        """
        from ospq_export.export.stage import export

        with (session or Session()).bars() as progress:
            written = export(
                self.path,
                batch_size=batch_size,
                extras=extras or Extras(fp16=fp16),
                opset=opset,
                overwrite=overwrite,
                progress=progress,
            )
        self.manifest = written.run.manifest
        return self

    def validate(
        self,
        data: Data,
        *,
        thresholds: Thresholds | None = None,
        session: Session | None = None,
        documents: bool = True,
        pictures: bool = True,
        **settings: Any,
    ) -> Report:
        """Hold the exported network to the fake-quantized one and to the float one, image by image.

        Args:
            data: images that the calibration has not seen.
            thresholds: what is allowed; None takes the defaults, with what the run's budget lets it lose.
            session: device, progress, workers.
            documents: whether report.md and report.html are written beside report.json.
            pictures: whether report.html may show images; their names stay.
            settings: of `validate.stage.validate`: backends, batch_size, limit, float_type, baseline, ...

        Returns:
            The report: true where both verdicts hold; `faithful` and `accuracy_kept` are None where the images are too few.

        Raises:
            InputError: see `validate.stage.validate`.
        """
        from ospq_export.validate import validate, write_documents

        how = session or Session()
        images = self._images(data)
        with joined() as world, how.bars(world.rank == 0) as progress:
            report = validate(
                self,
                images,
                thresholds=thresholds,
                device=how.device,
                workers=how.workers,
                progress=progress,
                world=world,
                **settings,
            )
        if documents and world.rank == 0:
            write_documents(self, report, images, pictures=pictures)
        return report

    def serve(self, repository: str | Path, name: str | None = None, *, overwrite: bool = False) -> Path:
        """Write the exported network into a model repository of Triton; see `deploy.serve`."""
        return serve(self, Path(repository), name, overwrite=overwrite)

    def bundle(
        self,
        out: str | Path,
        data: Data,
        *,
        images: int = BUNDLE_IMAGES,
        overwrite: bool = False,
        session: Session | None = None,
    ) -> Path:
        """Pack the exported network for a check on the device that will run it; see `deploy.bundle`."""
        how = session or Session()
        with how.bars() as progress:
            return bundle(
                self,
                Path(out),
                self._images(data),
                count=images,
                overwrite=overwrite,
                device=how.device,
                workers=how.workers,
                progress=progress,
            )

    def report_device(self, result: str | Path, *, documents: bool = True, **settings: Any) -> Report:
        """Judge what a bundle's script found on a device; see `deploy.report_device`."""
        return report_device(self, Path(result), documents=documents, **settings)

    def _images(self, data: Data) -> ImageSet | StreamSet | TensorSet:
        """Whatever was given as validation images, with the run's preprocessing and classes."""
        if isinstance(data, ImageSet | StreamSet | TensorSet):
            return data
        if isinstance(data, str | Path):
            return images_of(self, data, ClassChoice(), needed=False)
        return TensorSet(data, self.data, self.manifest.class_to_idx)


def _images(
    data: Data, config: DataConfig | None, classes: Sequence[str]
) -> ImageSet | StreamSet | TensorSet:
    """Whatever was given as calibration images, as the stage takes them."""
    if isinstance(data, ImageSet | StreamSet | TensorSet):
        return data
    known = {name: i for i, name in enumerate(classes)}
    if not isinstance(data, str | Path):
        size, data = first_size(data)
        return TensorSet(data, config or unknown_preprocessing(size), known)
    if config is None:
        raise InputError(
            "nothing tells how image files become this network's input",
            where=str(data),
            fix="give `preprocessing`, or tensors",
        )
    choice, held = ClassChoice(), Classes(known, "given by the caller")
    return image_set(open_source(data, choice), config, choice, None, held, needed=False)
