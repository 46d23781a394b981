"""`ospq-export export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ospq_export.cli import options
from ospq_export.cli.options import say
from ospq_export.cli.pack import packing
from ospq_export.deploy import BUNDLE_IMAGES
from ospq_export.engines.products import Product
from ospq_export.engines.targets import capabilities_to_build, check_formats, find_target
from ospq_export.errors import InputError, damaged
from ospq_export.runs.files import QUANTIZED_BRAIN_ONNX, QUANTIZED_HALF_ONNX, sidecar_file
from ospq_export.world.threads import use_threads

if TYPE_CHECKING:
    from ospq_export.engines.build import BuildSettings
    from ospq_export.engines.record import EngineRecord
    from ospq_export.export.jobs import Extras
    from ospq_export.formats.base import Format


def export(
    run: options.RunArgument,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Fixed batch size. Default: dynamic in model.onnx, 1 in the FP16 files and the engine."
        ),
    ] = None,
    fp16: Annotated[
        bool,
        typer.Option(
            "--fp16",
            help="Also model_qdq_fp16.onnx and its float baseline model_fp16.onnx; BF16 where values overflow.",
        ),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Also model_debug.onnx: every quantizer's codes and slice's output."),
    ] = False,
    int4: Annotated[
        bool,
        typer.Option(
            "--int4", help="Also model_int4.onnx: 4-bit weights stored as INT4; not for int8 engines."
        ),
    ] = False,
    uint8_input: Annotated[
        bool,
        typer.Option(
            "--uint8-input", help="Also model_uint8.onnx: takes uint8 (B, H, W, C), normalises itself."
        ),
    ] = False,
    activation_layout: Annotated[
        Literal["int8", "uint8"],
        typer.Option(
            help="uint8: also model_uint8_activations.onnx, the same codes for ONNX Runtime on x86."
        ),
    ] = "int8",
    opset: Annotated[
        int | None,
        typer.Option(help="Of ONNX's operators: 17 for TensorRT 8.6. Default: 20, or what the formats need."),
    ] = None,
    engine: Annotated[
        Product | None, typer.Option(help="Also build model.PRODUCT.smNN.engine from model_qdq_fp16.onnx.")
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="Engine with a dynamic batch: its min, opt and max, '1,8,32'.")
    ] = None,
    target: options.TargetOption = None,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(
            help="GPUs such as SM89; repeat for several. Default: those of --target, or this machine's."
        ),
    ] = None,
    workspace: Annotated[int | None, typer.Option(min=1, help="Most scratch memory of a layer, MiB.")] = None,
    timing_cache: Annotated[
        Path | None, typer.Option(help="TensorRT: file of timings to use and to extend.")
    ] = None,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Let later versions of TensorRT run the engine.")
    ] = False,
    hardware_compatibility: Annotated[
        str | None, typer.Option(help="TensorRT: ampere_plus or same_compute_capability.")
    ] = None,
    triton: Annotated[
        Path | None, typer.Option(help="Also a model in this model repository of Triton Inference Server.")
    ] = None,
    triton_model: Annotated[
        str | None, typer.Option(help="Its name there. Default: the run directory's.")
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(help="Also FILE.zip for a device: files, images, references, and a script that checks."),
    ] = None,
    data: options.PackedDataOption = None,
    bundle_images: Annotated[
        int | None, typer.Option(min=1, help=f"Images in the bundle. Default: {BUNDLE_IMAGES}.")
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Write files anew that an earlier export wrote. Default: those stay, what is missing is added.",
        ),
    ] = False,
    threads: options.ThreadsOption = None,
    quiet: options.QuietOption = False,
) -> None:
    """Write model.onnx (QDQ), model_fp32.onnx (baseline) and scales.json into a run directory; build an engine on request.

    Files of an earlier export stay as they are; further ones are added.
    """
    use_threads(threads)
    from ospq_export.export.jobs import Extras

    packed = packing(
        run,
        triton=triton,
        triton_model=triton_model,
        bundle=bundle,
        data=data,
        images=bundle_images,
        overwrite=overwrite,
        quiet=quiet,
    )
    files = fp16 or debug or int4 or uint8_input or activation_layout != "int8" or engine is not None
    if packed and packed.exported and not files and batch_size is None and opset is None:
        packed.write()
        return
    uint8 = activation_layout == "uint8"
    if uint8 and engine is not None:
        raise InputError(
            "TensorRT takes int8 activations only", where="--activation-layout uint8", fix="leave it out"
        )
    extras = Extras(
        fp16=fp16 or engine is not None,
        debug=debug,
        int4=int4,
        uint8_input=uint8_input,
        uint8_activations=uint8,
    )
    batches = None if profile is None else _batches(profile)
    hardware = None if target is None else find_target(target)
    if engine is None:
        of_engine = {
            "--profile": profile,
            "--compute-capability": compute_capability,
            "--workspace": workspace,
            "--timing-cache": timing_cache,
            "--version-compatible": version_compatible,
            "--hardware-compatibility": hardware_compatibility,
        }
        given = ", ".join(name for name, value in of_engine.items() if value)
        if given:
            raise InputError("only an engine has these", where=given, fix="give --engine")
        if hardware is not None:
            check_formats(hardware, _formats(run))
        run_export(run, batch_size, quiet, extras, batch_size or 1, opset=opset, overwrite=overwrite)
        packed.write()
        return
    from ospq_export.engines.build import BuildSettings
    from ospq_export.engines.record import check_target, name_of
    from ospq_export.runs.manifest import read_manifest

    settings = BuildSettings(
        product=engine,
        profile=batches,
        compute_capabilities=capabilities_to_build(engine, _formats(run), hardware, compute_capability or ()),
        version_compatible=version_compatible,
        hardware_compatibility=hardware_compatibility,
        workspace_mib=workspace,
        timing_cache=timing_cache,
    )
    # An engine that an interrupted build left is not listed: it is replaced without asking.
    name = name_of(settings)
    check_target(run / name, settings, overwrite=overwrite or name not in read_manifest(run).files)
    deploy = None if batches is not None else batch_size or 1
    run_export(run, batch_size, quiet, extras, deploy, opset=opset, overwrite=overwrite, engine=settings)
    packed.write()


def _formats(run: Path) -> list[Format]:
    from ospq_export.runs.manifest import read_manifest

    manifest = read_manifest(run)
    try:
        return list(manifest.formats().values())
    except InputError as error:
        raise damaged(str(error), run) from error


def _batches(text: str) -> tuple[int, int, int]:
    parts = text.replace(",", " ").split()
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        raise InputError(
            f"{text!r} is not three batch sizes, min, opt and max",
            where="--profile",
            fix="write it like 1,8,32",
        )
    return int(parts[0]), int(parts[1]), int(parts[2])


def run_export(
    run: Path,
    batch_size: int | None,
    quiet: bool,
    extras: Extras | None = None,
    deploy_batch_size: int | None = 1,
    *,
    opset: int | None = None,
    overwrite: bool = False,
    engine: BuildSettings | None = None,
) -> None:
    """Export, and build an engine on request, with progress bars and a line at the end."""
    from ospq_export.engines.record import build_engine, name_of
    from ospq_export.export import export
    from ospq_export.progress import stage_progress

    built: dict[str, EngineRecord] = {}

    def build(folder: Path) -> list[str]:
        assert engine is not None
        shown = None if quiet else progress
        # One of the two was written now, or by an earlier export.
        files = (place / f for place in (folder, run) for f in (QUANTIZED_BRAIN_ONNX, QUANTIZED_HALF_ONNX))
        source, name = next(file for file in files if file.is_file()), name_of(engine)
        built[name] = build_engine(source, folder / name, engine, progress=shown)
        return [name, sidecar_file(folder / name).name]

    with stage_progress(disable=quiet) as progress:
        done = export(
            run,
            batch_size=batch_size,
            extras=extras,
            deploy_batch_size=deploy_batch_size,
            opset=opset,
            overwrite=overwrite,
            progress=progress,
            finish=None if engine is None else build,
        )
    engines = [name for engine in built for name in (engine, sidecar_file(run / engine).name)]
    files = [name for name in done.written if name not in engines]
    listed = (name for name in done.run.manifest.files if name.endswith((".onnx", ".engine")))
    kept = [name for name in listed if name not in done.written]
    if files:
        say(f"exported {', '.join(files)} to {run}")
    if kept:
        say(f"unchanged: {', '.join(kept)}")
    for name, record in built.items():
        _print_engine(run / name, record)


def _print_engine(path: Path, record: EngineRecord) -> None:
    fusion = record.fusion
    say(
        f"built {path} with {record.product} {record.version} for "
        f"{', '.join(record.compute_capabilities)}: "
        f"{fusion.quantized_gemms} of {fusion.gemms} products quantized, "
        f"{fusion.fused_attentions} of {fusion.attentions} attentions one quantized kernel"
    )
    for name, reason in {**fusion.not_quantized, **fusion.not_fused}.items():
        say(f"  {name}: {reason}")
