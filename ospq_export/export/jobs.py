"""What an export is asked for, as a list of files to write."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from ospq_export.errors import InputError
from ospq_export.export.variants import shift_activations, store_int4, take_uint8
from ospq_export.formats.integer import Integer
from ospq_export.onnx.half import FP16_MAX, to_brain, to_half
from ospq_export.onnx.write import ACTIVATION_LAYOUT
from ospq_export.runs.files import (
    BRAIN_ONNX,
    DEBUG_ONNX,
    FLOAT_ONNX,
    HALF_ONNX,
    INT4_ONNX,
    QUANTIZED_BRAIN_ONNX,
    QUANTIZED_HALF_ONNX,
    QUANTIZED_ONNX,
    UINT8_ACTIVATIONS_ONNX,
    UINT8_ONNX,
)
from ospq_export.runs.run import Run

log = logging.getLogger(__name__)
Pass = Callable[[Any], None]
# Images that the calibration did not see may have somewhat larger values.
_HEADROOM = 1.5


@dataclass(frozen=True)
class Extras:
    """Files beside model.onnx, model_fp32.onnx and scales.json.

    Attributes:
        fp16: model_qdq_fp16.onnx, the quantized network with FP16 around the quantized operators, which is what engines are built
            from, and model_fp16.onnx, its float baseline; where values overflow FP16, the same with BF16.
        debug: model_debug.onnx, whose outputs include every quantizer's codes and every slice's output.
        int4: model_int4.onnx, with the codes of weights of at most 4 bits stored as INT4.
        uint8_input: model_uint8.onnx, which takes uint8 (B, H, W, C) images and normalises them itself.
        uint8_activations: model_uint8_activations.onnx, whose activations have the same codes as uint8, 128 higher, for
            processors whose kernels multiply uint8 by int8 only; not for TensorRT.
    """

    fp16: bool = False
    debug: bool = False
    int4: bool = False
    uint8_input: bool = False
    uint8_activations: bool = False


@dataclass(frozen=True)
class Job:
    """A file: what it is made of, and what becomes of the translated graph."""

    file: str
    batch_size: int | None
    quantized: bool = True
    expose_probes: bool = False
    passes: tuple[Pass, ...] = ()
    metadata: tuple[tuple[str, str], ...] = ()

    @property
    def graph(self) -> tuple[bool, int | None]:
        """What it is translated from: jobs with the same share a translation."""
        return self.quantized, self.batch_size


def jobs_of(run: Run, extras: Extras, batch_size: int | None, deploy_batch_size: int | None) -> list[Job]:
    """The files to write, the float network's first.

    Raises:
        InputError: the run's formats have no such file.
    """
    jobs = [Job(FLOAT_ONNX, batch_size, quantized=False)]
    if extras.fp16:
        jobs += _halves(run, deploy_batch_size)
    jobs.append(Job(QUANTIZED_ONNX, batch_size))
    if extras.debug:
        jobs.append(Job(DEBUG_ONNX, batch_size, expose_probes=True))
    if extras.int4:
        jobs.append(_int4_job(run, batch_size))
    if extras.uint8_activations:
        _check_integers(run)
        layout = ((ACTIVATION_LAYOUT, "uint8"),)
        jobs.append(Job(UINT8_ACTIVATIONS_ONNX, batch_size, passes=(shift_activations,), metadata=layout))
    if extras.uint8_input:
        if not run.manifest.data.known:
            raise InputError(
                "nothing tells how the network's images were normalised",
                where="`uint8_input`",
                fix="leave it out, or calibrate with `preprocessing`",
            )
        layout = (("input", "uint8 (B, H, W, C), resized and cropped"),)
        normalise = partial(take_uint8, data=run.manifest.data)
        jobs.append(Job(UINT8_ONNX, batch_size, passes=(normalise,), metadata=layout))
    return jobs


def _int4_job(run: Run, batch_size: int | None) -> Job:
    formats = {r.name: r.read_format() for r in run.manifest.quantizers if r.kind == "weight"}
    narrow = frozenset(f"{n}.codes" for n, f in formats.items() if f.bits <= 4 and isinstance(f, Integer))
    if not narrow:
        raise InputError(
            f"no weight of this run has 4 bits or fewer (recipe {run.manifest.recipe.name})",
            where="`int4`",
            fix="calibrate with weight_bits=4, or leave `int4` out",
        )
    passes = (partial(store_int4, weights=narrow),)
    return Job(INT4_ONNX, batch_size, passes=passes, metadata=(("storage", "int4"),))


def _halves(run: Run, batch_size: int | None) -> list[Job]:
    """The files with FP16 around the quantized operators, or with BF16 where the calibration saw values that FP16 lacks."""
    names, change, precision = (HALF_ONNX, QUANTIZED_HALF_ONNX), to_half, "float16"
    widest = max(run.manifest.profile, key=lambda record: record.largest, default=None)
    if widest is not None and widest.largest * _HEADROOM > FP16_MAX:
        names, change, precision = (BRAIN_ONNX, QUANTIZED_BRAIN_ONNX), to_brain, "bfloat16"
        log.warning(
            "values reach %.3g at %s, and FP16 ends at %g: %s and %s have BF16 around the quantized operators",
            *(widest.largest, widest.name, FP16_MAX, *names),
        )
    plain, quantized = names
    options: dict[str, Any] = {"passes": (change,), "metadata": (("precision", precision),)}
    return [Job(plain, batch_size, quantized=False, **options), Job(quantized, batch_size, **options)]


def _check_integers(run: Run) -> None:
    other = ((n, f) for n, f in run.manifest.formats().items() if not isinstance(f, Integer))
    for name, format_ in other:
        raise InputError(
            f"{name} has {format_.name} codes, which have no uint8 form",
            where="`uint8_activations`",
            fix="leave it out, or calibrate with integers",
        )
