"""Networks with the images that say how accurate they are: the packaged ones, or one that the command line names."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lib.rows import add_network
from ospq_export.calibrate.observe import observe
from ospq_export.data import DataConfig, ImageSet, resolve_data_config
from ospq_export.demo import demo_data_overrides, demo_images, demo_spec
from ospq_export.errors import InputError
from ospq_export.graph.insertion import insert_quantizers
from ospq_export.graph.quantizers import QuantizedGraph
from ospq_export.models.timm import ModelSpec, create_model, parse_model_kwargs
from ospq_export.runs.run import Run
from ospq_export.tasks.statistics import BoolArray


@dataclass(frozen=True)
class Network:
    """What is measured: a model, its preprocessing and its images."""

    name: str
    spec: ModelSpec
    model: torch.nn.Module
    config: DataConfig
    calibration: ImageSet
    validation: ImageSet


def demo_network(name: str) -> Network:
    """A packaged network with its images."""
    spec = demo_spec(name)
    model = create_model(spec)
    config = resolve_data_config(model, spec, demo_data_overrides())
    return Network(
        f"demo-{name}", spec, model, config, demo_images("calibration", config), demo_images("test", config)
    )


def own_network(args: argparse.Namespace) -> Network:
    """The network and folders that the command line names."""
    kwargs = parse_model_kwargs(args.model_kwargs)
    spec = ModelSpec(
        name=args.model, kwargs=kwargs, checkpoint=args.checkpoint, pretrained=args.checkpoint is None
    )
    model = create_model(spec)
    config = resolve_data_config(model, spec, {})
    classes: Any = model.num_classes
    calibration = ImageSet.from_folder(Path(args.calibration), config, outputs=classes)
    validation = ImageSet.from_folder(Path(args.validation), config, outputs=classes)
    return Network(args.name, spec, model, config, calibration, validation)


def add_networks(parser: argparse.ArgumentParser) -> None:
    """The arguments that `chosen_networks` reads."""
    parser.add_argument("what", choices=("demo", "own", "table"))
    parser.add_argument("--only", nargs="*", help="networks (demo) to measure", default=["vit", "swin"])
    add_network(parser)


def chosen_networks(args: argparse.Namespace) -> list[Network]:
    """What the command line asks to measure; none where it asks for the table."""
    if args.what == "table":
        return []
    return [demo_network(name) for name in args.only] if args.what == "demo" else [own_network(args)]


def image_set(folder: Path | None, split: Literal["calibration", "test"], config: DataConfig) -> ImageSet:
    """A folder's images, or a packaged network's own of that split."""
    return demo_images(split, config) if folder is None else ImageSet.from_folder(folder, config)


def finished_run(folder: Path) -> Run | None:
    """The run in a folder; None where there is none yet, or an interrupted one."""
    try:
        return Run.open(folder)
    except InputError:
        return None


def observed_network(run: Run, images: Tensor) -> QuantizedGraph:
    """The run's float network (equalized, where its recipe says so) with the ranges that the search finds on its images."""
    recipe = run.manifest.recipe
    graph = insert_quantizers(run.captured(), recipe.formats())
    observe(graph, images[: recipe.observation_images], batch_size=64, seed=run.manifest.calibration.seed)
    return graph


def correct(module: torch.nn.Module, network: Network, count: int) -> BoolArray:
    """Which of the first validation images a network classifies correctly."""
    found, device = [], next(module.buffers()).device
    with torch.inference_mode():
        for batch in network.validation.batches(100, range(count)):
            found.append(module(batch.images.to(device)).argmax(1).cpu() == batch.labels)
    return torch.cat(found).numpy()
