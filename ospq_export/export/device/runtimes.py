"""What executes an ONNX file on a device, behind one small interface: TensorRT 8.6 to 11, or ONNX Runtime where there is none.

Python 3.8 and numpy are all that is needed beside the runtime itself. check.py uses it.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import platform
from pathlib import Path
from typing import Any, Dict, Tuple

import numpy as np

Arrays = Dict[str, Any]


class BadInput(Exception):
    """One line that says what is wrong."""


class Cuda:
    """The few calls of the CUDA driver that are needed; it comes with every NVIDIA driver, JetPack's included."""

    def __init__(self) -> None:
        try:
            self.library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        except OSError as error:
            raise BadInput("there is no NVIDIA driver here: %s" % error) from error
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self("cuInit", 0)
        self("cuDeviceGet", ctypes.byref(device), 0)
        # The primary context is the one that TensorRT uses, too.
        self("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self("cuCtxSetCurrent", context)
        name = ctypes.create_string_buffer(256)
        self("cuDeviceGetName", name, 256, device)
        self.device = name.value.decode()

    def __call__(self, function: str, *arguments: Any) -> None:
        """Call a function of the driver; an error of its is bad input."""
        status = getattr(self.library, function)(*arguments)
        if status:
            raise BadInput("the CUDA driver's %s failed with error %d" % (function, status))

    def empty(self, size: int) -> ctypes.c_uint64:
        """Memory on the GPU, `size` bytes."""
        address = ctypes.c_uint64()
        self("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(size, 1)))
        return address

    def copy(self, address: ctypes.c_uint64, values: Any, back: bool = False) -> None:
        """Copy an array to the GPU, or back."""
        pointer, size = ctypes.c_void_p(values.ctypes.data), ctypes.c_size_t(values.nbytes)
        if back:
            self("cuMemcpyDtoH_v2", pointer, address, size)
        else:
            self("cuMemcpyHtoD_v2", address, pointer, size)


class TensorRT:
    """An engine of a file, built and run by TensorRT; what this version offers decides how.

    Attributes:
        version, device: what runs it, and where.
        half: whether its float parts may be FP16 although the file's are not.
        fixed: the file's batch size; None where it is free.
        size: bytes of the engine.
    """

    log: Any = None

    def __init__(self, path: Path, batch: int, shape: Tuple[int, ...], module: str = "tensorrt") -> None:
        self.trt = trt = load(module)
        self.version = "%s %s" % (module, trt.__version__)
        self.cuda = Cuda()
        self.device = self.cuda.device
        # TensorRT wants one logger per process.
        log = TensorRT.log = TensorRT.log or trt.Logger(trt.Logger.WARNING)
        builder, network, self.parser, typed = parse(trt, log, path)
        config = builder.create_builder_config()
        self.half = not typed and set_precision(trt, config, network)
        if hasattr(trt.BuilderFlag, "TF32"):
            # On by default; float32 in the file is to be float32.
            config.clear_flag(trt.BuilderFlag.TF32)
        first = network.get_input(0)
        self.fixed = first.shape[0] if first.shape[0] > 0 else None
        if -1 in tuple(first.shape):
            profile = builder.create_optimization_profile()
            profile.set_shape(first.name, (self.fixed or 1, *shape), *[(self.fixed or batch, *shape)] * 2)
            config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise BadInput("TensorRT cannot build %s: its messages are above" % path.name)
        self.size = int(plan.nbytes)
        self.runtime = trt.Runtime(log)
        self.engine = self.runtime.deserialize_cuda_engine(plan)
        self.context = self.engine.create_execution_context()
        self.names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        self.input = first.name
        self.stream = ctypes.c_void_p()
        self.cuda("cuStreamCreate", ctypes.byref(self.stream), 0)
        self.held: Dict[Tuple[str, Tuple[int, ...]], Any] = {}

    def run(self, images: Any) -> Arrays:
        """Outputs by name, float32, of images (B, C, H, W) float32."""
        self.context.set_input_shape(self.input, images.shape)
        found = {}
        for name in self.names:
            # nptype of 8.6 needs a numpy that has numpy.bool.
            half = self.engine.get_tensor_dtype(name) == self.trt.DataType.HALF
            kind = np.float16 if half else np.float32
            shape = tuple(self.context.get_tensor_shape(name))
            if (name, shape) not in self.held:
                values = np.empty(shape, kind)
                self.held[name, shape] = values, self.cuda.empty(values.nbytes)
            values, address = self.held[name, shape]
            self.context.set_tensor_address(name, address.value)
            if name == self.input:
                self.cuda.copy(address, np.ascontiguousarray(images, kind))
            else:
                found[name] = values, address
        if not self.context.execute_async_v3(self.stream.value):
            raise BadInput("TensorRT failed to run the engine")
        self.cuda("cuStreamSynchronize", self.stream)
        for values, address in found.values():
            self.cuda.copy(address, values, back=True)
        return {name: values.astype(np.float32) for name, (values, _) in found.items()}


def load(module: str) -> Any:
    """A runtime's Python module."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        raise BadInput("%s cannot be used: %s" % (module, error)) from error


def parse(trt: Any, log: Any, path: Path) -> Tuple[Any, Any, Any, bool]:
    """Parse a file.

    Returns:
        Builder, network, parser, and whether the network is strongly typed: then the file alone says what has which precision.

    Raises:
        BadInput: the parser refuses it.
    """
    flags = trt.NetworkDefinitionCreationFlag
    # From 9 on networks can be strongly typed; 11 has no other ones, and no flag. 8.6 wants the batch to be explicit.
    typed = hasattr(flags, "STRONGLY_TYPED") or not hasattr(flags, "EXPLICIT_BATCH")
    flag = getattr(flags, "STRONGLY_TYPED" if typed else "EXPLICIT_BATCH", None)
    builder = trt.Builder(log)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise BadInput("TensorRT's parser refuses %s: %s" % (path.name, "; ".join(errors[:3])))
    return builder, network, parser, typed


def set_precision(trt: Any, config: Any, network: Any) -> bool:
    """Allow FP16, and INT8 where the file quantizes, of networks that are not strongly typed; returns whether FP16 is allowed."""
    layers = (network.get_layer(i).type for i in range(network.num_layers))
    # Without quantizers, INT8 would want a calibration.
    quantized = any(kind in (trt.LayerType.QUANTIZE, trt.LayerType.DEQUANTIZE) for kind in layers)
    for name in ("FP16", "INT8") if quantized else ("FP16",):
        if hasattr(trt.BuilderFlag, name):
            config.set_flag(getattr(trt.BuilderFlag, name))
    return hasattr(trt.BuilderFlag, "FP16")


class OnnxRuntime:
    """The same interface over ONNX Runtime on the CPU, for machines without TensorRT."""

    def __init__(self, path: Path, batch: int, shape: Tuple[int, ...], module: str = "onnxruntime") -> None:
        runtime = load(module)
        self.version, self.half, self.size = (
            "%s %s" % (module, runtime.__version__),
            False,
            path.stat().st_size,
        )
        self.device = platform.machine()
        try:
            options = runtime.SessionOptions()
            # Processors without VNNI add pairs of 8-bit products in 16 bits otherwise, which overflow.
            options.add_session_config_entry("session.x64quantprecision", "1")
            self.session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise BadInput("ONNX Runtime cannot load %s: %s" % (path.name, error)) from error
        first = self.session.get_inputs()[0]
        self.input, size = first.name, first.shape[0]
        self.fixed = size if isinstance(size, int) else None

    def run(self, images: Any) -> Arrays:
        """Outputs by name, float32, of images (B, C, H, W) float32."""
        names = [output.name for output in self.session.get_outputs()]
        found = self.session.run(names, {self.input: images})
        return {name: np.asarray(values, np.float32) for name, values in zip(names, found)}


RUNTIMES = {"tensorrt": TensorRT, "onnxruntime": OnnxRuntime}
