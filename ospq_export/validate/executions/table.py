"""Every way to run a network that a validation knows, in one table: what it runs, and what it is to the verdicts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from ospq_export.engines.products import Product
from ospq_export.errors import InputError
from ospq_export.graph.outputs import output_names
from ospq_export.runs.files import FLOAT_ONNX, HALF_ONNX, QUANTIZED_HALF_ONNX, QUANTIZED_ONNX
from ospq_export.validate.executions.backends import Backend, OnnxRuntimeBackend, TorchBackend
from ospq_export.validate.executions.engines import EngineBackend, engine_file
from ospq_export.validate.executions.half import HalfNetwork
from ospq_export.validate.executions.openvino import OpenVinoBackend, check_openvino
from ospq_export.validate.executions.triton import ServedBackend, Server, given

if TYPE_CHECKING:
    from ospq_export.runs.run import Run

FLOAT, FAKE_QUANT, FAKE_QUANT_FP16 = "float", "fake_quant", "fake_quant-fp16"
OPTIMIZED, UNOPTIMIZED = "onnxruntime", "onnxruntime-unoptimised"
QDQ_FP16, FP32, FP16 = "onnxruntime-qdq-fp16", "onnxruntime-fp32", "onnxruntime-fp16"
OPENVINO, OPENVINO_INTEGER, OPENVINO_FP32 = "openvino", "openvino-integer", "openvino-fp32"
TRITON, DEVICE = "triton", "device"


class Role(StrEnum):
    """What an execution is to the verdicts."""

    FLOAT = "the float network"
    SIMULATED = "the fake-quantized network, which deployed ones are held to"
    DEPLOYED = "a quantized file or engine"
    FLOAT_FILE = "a float file"


class Runtime(StrEnum):
    """What executes."""

    TORCH = "torch"
    ONNX_RUNTIME = "onnxruntime"
    OPENVINO = "openvino"
    ENGINE = "engine"
    SERVER = "a server"
    RECORD = "a file of what a device returned"


@dataclass(frozen=True)
class Execution:
    """One way to run a network.

    Attributes:
        name: how the report calls it.
        role: what it is to the verdicts.
        runtime: what executes it.
        file: in the run directory; None for torch's, for engines, and for what runs elsewhere.
        float_type: of what is not quantized, "fp32" or "fp16"; None where the file says.
        provider: ONNX Runtime's; None takes the one that goes with the torch device.
        optimize: whether ONNX Runtime may change the graph.
        exact: whether OpenVINO leaves its integer kernels where they saturate.
        default: whether it runs where no execution is asked for by name.
    """

    name: str
    role: Role
    runtime: Runtime
    file: str | None = None
    float_type: str | None = "fp32"
    provider: str | None = None
    optimize: bool = True
    exact: bool = True
    default: bool = False

    @property
    def shows_codes(self) -> bool:
        """Whether the codes inside of its file can be looked at; ONNX Runtime does it, whoever executes the file."""
        return self.role is Role.DEPLOYED and self.file is not None

    def reference(self, float_type: str) -> str | None:
        """The execution that it is held to: the float network for a float file, else the fake-quantized one of its float type.

        Args:
            float_type: of engines, which do not say it.
        """
        if self.role is Role.FLOAT_FILE:
            return FLOAT
        if self.role is not Role.DEPLOYED:
            return None
        return FAKE_QUANT_FP16 if (self.float_type or float_type) == "fp16" else FAKE_QUANT

    def provider_on(self, device: str) -> str:
        """ONNX Runtime's provider where the torch executions run on `device`."""
        return self.provider or provider_of(device)

    def open(self, run: Run, device: str, server: Server | None = None) -> Backend:
        """Make it ready to run.

        Raises:
            InputError: it is not available.
        """
        if self.runtime is Runtime.SERVER:
            return ServedBackend(self.name, run, given(server))
        if self.runtime is Runtime.RECORD:
            raise not_here(self.name)
        if self.runtime is Runtime.ENGINE:
            return EngineBackend(self.name, engine_file(run.path, Product(self.name)))
        if self.runtime is Runtime.OPENVINO:
            check_openvino(run, str(self.file))
            return OpenVinoBackend(self.name, run.runnable(str(self.file)), exact=self.exact)
        if self.file is not None:
            path, provider, without = run.runnable(self.file), self.provider_on(device), run.unoptimized()
            return OnnxRuntimeBackend(
                self.name, path, optimize=self.optimize, provider=provider, without=without
            )
        graph = run.captured() if self.role is Role.FLOAT else run.quantized_graph().module
        module = HalfNetwork(graph) if self.role is not Role.FLOAT and self.float_type == "fp16" else graph
        return TorchBackend(self.name, module, device, output_names(graph.graph))


def not_here(name: str) -> InputError:
    """The error of an execution that runs on another machine."""
    fix = "run the bundle's script there, and give what it writes as `device_result`"
    return InputError("it does not run here", where=f"execution {name!r}", fix=fix)


def _table() -> Iterator[Execution]:
    torch, ort, engine = Runtime.TORCH, Runtime.ONNX_RUNTIME, Runtime.ENGINE
    compiled = Runtime.OPENVINO
    yield Execution(FLOAT, Role.FLOAT, torch, default=True)
    yield Execution(FAKE_QUANT, Role.SIMULATED, torch, default=True)
    yield Execution(UNOPTIMIZED, Role.DEPLOYED, ort, QUANTIZED_ONNX, optimize=False, default=True)
    yield Execution(OPTIMIZED, Role.DEPLOYED, ort, QUANTIZED_ONNX, default=True)
    yield Execution("onnxruntime-cuda", Role.DEPLOYED, ort, QUANTIZED_ONNX, provider="cuda", default=True)
    yield Execution(
        "onnxruntime-tensorrt", Role.DEPLOYED, ort, QUANTIZED_ONNX, provider="tensorrt", default=True
    )
    yield Execution(OPENVINO, Role.DEPLOYED, compiled, QUANTIZED_ONNX)
    for product in Product:
        yield Execution(product.value, Role.DEPLOYED, engine, float_type=None, default=True)
    yield Execution(TRITON, Role.DEPLOYED, Runtime.SERVER, float_type=None)
    yield Execution(DEVICE, Role.DEPLOYED, Runtime.RECORD, float_type=None)
    yield Execution(FAKE_QUANT_FP16, Role.SIMULATED, torch, float_type="fp16")
    yield Execution(QDQ_FP16, Role.DEPLOYED, ort, QUANTIZED_HALF_ONNX, "fp16")
    yield Execution(OPENVINO_INTEGER, Role.DEPLOYED, compiled, QUANTIZED_ONNX, exact=False)
    yield Execution(FP32, Role.FLOAT_FILE, ort, FLOAT_ONNX)
    yield Execution(OPENVINO_FP32, Role.FLOAT_FILE, compiled, FLOAT_ONNX, exact=False)
    yield Execution(FP16, Role.FLOAT_FILE, ort, HALF_ONNX, "fp16")


TABLE: dict[str, Execution] = {execution.name: execution for execution in _table()}
ALL_BACKENDS = tuple(TABLE)
# Nobody can look into what runs on another machine.
CLOSED = tuple(name for name, e in TABLE.items() if e.runtime in (Runtime.SERVER, Runtime.RECORD))
DEFAULT_BACKENDS = tuple(name for name, e in TABLE.items() if e.default)


def with_role(*roles: Role) -> list[str]:
    """Names of the executions of these roles."""
    return [name for name, execution in TABLE.items() if execution.role in roles]


def provider_of(device: str) -> str:
    """ONNX Runtime's provider that goes with a torch device."""
    return "cuda" if device.startswith("cuda") else "cpu"


def float_beside(name: str, names: Collection[str], kinds: Sequence[str] = ("fp32",)) -> Iterator[str]:
    """The float executions of the same runtime as one that ran: that of its own engine or device, then files by their type.

    Args:
        name: of the execution.
        names: of what ran.
        kinds: float types, the best first.
    """
    own = f"{name}, float"
    if own in names:
        yield own
    files = [TABLE[other] for other in with_role(Role.FLOAT_FILE) if other in names]
    for kind in kinds:
        yield from (e.name for e in files if e.runtime is TABLE[name].runtime and e.float_type == kind)
