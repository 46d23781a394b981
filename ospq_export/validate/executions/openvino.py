"""OpenVINO on the processor: a compiled engine that runs without a GPU, and what its compiled network multiplies in integers.

On x86-64 without VNNI its 8-bit kernels add pairs of products in 16 bits, which saturate (oneDNN, "Nuances of int8 computations";
NNCF's `overflow_fix`). It has no exact integer kernels to choose instead, so there the products are computed in float.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ospq_export.errors import InputError, listed, reason_of
from ospq_export.onnx.view import PRODUCTS, OnnxGraph
from ospq_export.runs.files import FLOAT_ONNX, stored_bytes
from ospq_export.tasks.measure import Outputs
from ospq_export.tasks.statistics import FloatArray
from ospq_export.validate.executions.backends import in_batches
from ospq_export.validate.executions.probes import read_proto
from ospq_export.world.processor import examine_processor, saturates

if TYPE_CHECKING:
    from ospq_export.runs.run import Run

FLOAT_PRODUCTS = "LP_TRANSFORMS_MODE"
"""Property of OpenVINO's CPU plugin: "NO" leaves out the low precision transformations, so that products stay in float."""
_TELEMETRY = "openvino_telemetry"
# Types of integer operands, and kinds of nodes of a compiled network that multiply.
_INTEGERS = ("i8", "u8")
_PRODUCTS = ("MatMul", "FullyConnected", "Convolution")
# Lines of OpenVINO's messages that say where in its sources they come from, and nothing of the file.
_WHEREABOUTS = ("Exception from ", "Check '", "FrontEnd API failed")


def load_openvino() -> Any:
    """OpenVINO's Python module, imported without its telemetry.

    By itself the import tells Google Analytics of it, and leaves an identifier in the home directory. Where the package
    `openvino_telemetry` cannot be imported, OpenVINO does neither.

    Raises:
        InputError: it is not installed, or its libraries cannot be loaded.
    """
    try:
        with _hidden(_TELEMETRY):
            return importlib.import_module("openvino")
    except (ImportError, OSError, RuntimeError) as error:
        raise InputError(
            f"OpenVINO cannot be used: {reason_of(error)}", fix="pip install 'ospq-export[openvino]'"
        ) from error


@contextlib.contextmanager
def _hidden(name: str) -> Iterator[None]:
    """Make a package impossible to import for a while."""
    before = sys.modules.pop(name, None)
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before


def check_openvino(run: Run, file: str) -> None:
    """Hold an execution in OpenVINO to what there is.

    It reads files with FP8 as well, and computes something else: no logits of any image were those of the quantized network.

    Args:
        run: exported.
        file: in the run directory.

    Raises:
        InputError: the run has no such file, or formats that are no integers in it; OpenVINO is not installed.
    """
    path = run.file(file)
    if file != FLOAT_ONNX and not run.has_integers_only:
        raise InputError(
            "OpenVINO computes integer formats only as the file says", where=path, fix="use ONNX Runtime"
        )
    load_openvino()


class OpenVinoBackend:
    """An ONNX file compiled by OpenVINO for the processor.

    Args:
        name: how the report calls it.
        path: a file with one input (B, C, H, W) float32.
        exact: products in float where the processor's integer kernels saturate; otherwise OpenVINO's own choice.
        threads: None takes as many as torch has.

    Raises:
        InputError: OpenVINO is not installed, or cannot load the file.

    Attributes:
        findings: what a reader has to know of it, a line each.
    """

    def __init__(self, name: str, path: Path, *, exact: bool = True, threads: int | None = None) -> None:
        self.name, self.path = name, path
        openvino, saturated = load_openvino(), openvino_saturates()
        in_float = exact and saturated
        properties = _properties(threads or torch.get_num_threads())
        properties |= {FLOAT_PRODUCTS: "NO"} if in_float else {}
        self.compiled = _compile(path, properties)
        self.input = self.compiled.inputs[0]
        # OpenVINO gives a tensor several names, of which any may come first.
        self.names = [output.name for output in read_proto(path).graph.output]
        batch = self.input.partial_shape[0]
        self.fixed_batch = None if batch.is_dynamic else batch.get_length()
        products = read_products(self.compiled, path)
        if in_float:
            products = replace(products, fused=0)
        self.findings = list(_findings(path.name, products, in_float, saturated)) if products.total else []
        self.detail = {
            "runtime": f"openvino {openvino.__version__.partition('-')[0]}",
            "device": str(self.compiled.get_property("EXECUTION_DEVICES")[0]),
            "threads": str(self.compiled.get_property("INFERENCE_NUM_THREADS")),
            "file": path.name,
            "bytes": str(stored_bytes(path)),
        }
        if products.total:
            self.detail["quantized products"] = str(products)
        if in_float:
            self.detail["properties"] = f"{FLOAT_PRODUCTS}=NO"

    def __call__(self, images: FloatArray) -> Outputs:
        """The outputs by name, float32 (B, ...) each, of images (B, C, H, W) float32.

        Raises:
            InputError: the file takes images of another size or type.
        """
        self._check(images)
        return in_batches(self._run, images, self.fixed_batch)

    def _run(self, images: FloatArray) -> Outputs:
        found = self.compiled({0: images})
        return {name: found[name] for name in self.names}

    def _check(self, images: FloatArray) -> None:
        expected, given = list(self.input.partial_shape)[1:], images.shape[1:]
        fits = len(expected) == len(given)
        fits = fits and all(e.is_dynamic or e.get_length() == g for e, g in zip(expected, given, strict=True))
        kind = self.input.element_type.get_type_name()
        if not fits or kind != "f32":
            raise InputError(
                f"the file takes {kind} [{', '.join(map(str, expected))}], the data is f32 {list(given)}",
                where=self.path,
                fix="export the run again",
            )


def _properties(threads: int) -> dict[str, Any]:
    """What OpenVINO would otherwise choose by the machine, or by guesses about who calls it."""
    return {
        # Some processors compute float parts in bfloat16 unless told otherwise: no longer the function that is judged.
        "INFERENCE_PRECISION_HINT": "f32",
        # Activations that the file leaves in float would be quantized on the fly, where weights are integers.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        # One call at a time with all threads, as the other executions; THROUGHPUT divides them among calls that never come.
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,
        # No cache of compiled networks, whatever the environment of the process says.
        "CACHE_DIR": "",
    }


@functools.cache
def _core() -> Any:
    """One for the whole process: of two, the second puts back the first one's stack for signals, which may be gone by then."""
    return load_openvino().Core()


def _compile(path: Path, properties: dict[str, Any]) -> Any:
    try:
        return _core().compile_model(_core().read_model(str(path)), "CPU", properties)
    except RuntimeError as error:
        what = f"OpenVINO cannot load the file: {_reason(error)}"
        raise InputError(what, where=path, fix="export the run again") from error


def _reason(error: RuntimeError) -> str:
    """The first line of OpenVINO's message that is about the file."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((x for x in lines if x and not x.startswith(_WHEREABOUTS)), reason_of(error))


@functools.cache
def openvino_saturates() -> bool:
    """Whether OpenVINO's products of 8-bit integers come out wrong on this processor; asked, not guessed."""

    def execute(model: bytes, x: FloatArray) -> FloatArray:
        return _core().compile_model(_core().read_model(model), "CPU", _properties(threads=1))(x)[0]

    return saturates(execute)


@dataclass(frozen=True)
class Products:
    """What became of a file's quantized products (MatMul, Gemm, Conv) in OpenVINO's compiled network.

    Attributes:
        total: how many there are.
        integers: how many have operands of 8-bit integers.
        fused: how many lie inside kernels that do not say what they multiply.
        named_float: names of others, nodes of the file; OpenVINO loses some.
    """

    total: int
    integers: int
    fused: int
    named_float: tuple[str, ...]

    @property
    def floats(self) -> int:
        """How many are computed in float."""
        return self.total - self.integers - self.fused

    def __str__(self) -> str:
        """How many of each kind."""
        inside = f", {self.fused} in fused kernels that do not say" if self.fused else ""
        return f"{self.integers} of {self.total} in 8-bit integers, {self.floats} in float{inside}"


def read_products(compiled: Any, path: Path) -> Products:
    """Find a file's quantized products among the nodes that OpenVINO executes.

    A node's own `runtimePrecision` is of no use: it is i8 where float activations meet weights that are stored as integers.

    Args:
        compiled: OpenVINO's compiled network.
        path: the file that it was compiled from.

    Raises:
        InputError: the file is not readable.
    """
    graph = OnnxGraph(read_proto(path), path)
    names = {n.name for n in graph.nodes if n.op_type in PRODUCTS and not graph.unquantized(n)}
    integers, fused, floats, unnamed = set(), set(), set(), 0
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        kind, layers = (info[key].astype(str) for key in ("layerType", "originalLayersNames"))
        # A node that takes the product's place is called <product>/<what it adds>.
        found = {name for layer in layers.split(",") for name in _beginnings(layer)} & names
        if kind == "Subgraph":
            fused |= found
        elif kind in _PRODUCTS and _multiplies_integers(node):
            integers |= found
            unnamed += not found
        elif kind in _PRODUCTS:
            floats |= found
    integers, fused = integers - floats, fused - integers - floats
    lost = names - integers - fused - floats
    # OpenVINO gives some nodes names of its own, and executes some products twice.
    count = len(integers) + min(unnamed, len(lost))
    return Products(len(names), count, len(fused), tuple(sorted(floats if unnamed else floats | lost)))


def _multiplies_integers(node: Any) -> bool:
    operands = node.inputs()[:2]
    return all(operand.get_element_type().get_type_name() in _INTEGERS for operand in operands)


def _beginnings(layer: str) -> list[str]:
    parts = layer.split("/")
    return ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _findings(file: str, products: Products, in_float: bool, saturated: bool) -> Iterator[str]:
    """What is to be said of a file with quantized products."""
    if saturated:
        how = f"its property {FLOAT_PRODUCTS}=NO, which computes them in float"
        done = f"executed with {how}, to be deployed with it on such a processor"
        advice = f"use a processor with VNNI, or set {how}"
        yield (
            f"{file}: OpenVINO's 8-bit products can saturate on this processor ({examine_processor()}): "
            f"{done if in_float else advice}"
        )
    if products.floats and not in_float:
        shown = listed(list(products.named_float)) or "it does not say which"
        yield (
            f"{file}: OpenVINO computes {products.floats} of {products.total} quantized products in float: {shown}"
        )


def openvino_findings(executions: Sequence[Any]) -> list[str]:
    """What a reader has to know of the OpenVINO executions among all, a line each."""
    found = (line for e in executions if isinstance(e, OpenVinoBackend) for line in e.findings)
    return list(dict.fromkeys(found))
