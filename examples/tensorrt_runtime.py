"""Classify an image with an exported engine: the TensorRT (or TensorRT-RTX) runtime, CUDA buffers and a stream, numpy, Pillow.

    python examples/tensorrt_runtime.py RUN/model.tensorrt-rtx.sm89.engine image.jpg

Needs a GPU and `pip install cuda-python`. What the engine is and how images are prepared comes from the .engine.json beside it.
"""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
from onnx_runtime import preprocess


def checked(result: tuple) -> object:
    """The value of a CUDA runtime call; cuda-python returns (status, value)."""
    status, *values = result
    if int(status) != 0:
        raise SystemExit(f"CUDA: {status.name}")
    return values[0] if values else None


class Engine:
    """A loaded engine with its buffers."""

    def __init__(self, path: Path, sidecar: dict) -> None:
        from cuda.bindings import runtime as cuda

        self.cuda = cuda
        trt = importlib.import_module(sidecar["product"].replace("-", "_"))
        if trt.__version__ != sidecar["version"] and not sidecar["version_compatible"]:
            raise SystemExit(f"built with {sidecar['version']}, this is {trt.__version__}: build it again")
        self.runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        self.engine = self.runtime.deserialize_cuda_engine(path.read_bytes())
        if self.engine is None:
            # The reason is in TensorRT's log, above; what is known from here is what the engine was built for.
            targets = ", ".join(sidecar["compute_capabilities"])
            raise SystemExit(
                f"{sidecar['product']} {trt.__version__} cannot load {path}, which {sidecar['version']} built for {targets}; "
                "it says why above"
            )
        self.context = self.engine.create_execution_context()
        self.stream = checked(cuda.cudaStreamCreate())

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Logits (B, K) float32 of images (B, C, H, W) float32."""
        kinds, cuda = self.cuda.cudaMemcpyKind, self.cuda
        self.context.set_input_shape("images", images.shape)
        logits = np.empty(tuple(self.context.get_tensor_shape("logits")), np.float32)
        buffers = {"images": images, "logits": logits}
        device = {name: checked(cuda.cudaMalloc(array.nbytes)) for name, array in buffers.items()}
        for name, address in device.items():
            self.context.set_tensor_address(name, int(address))
        to_device, to_host = kinds.cudaMemcpyHostToDevice, kinds.cudaMemcpyDeviceToHost
        copy = cuda.cudaMemcpyAsync
        checked(copy(device["images"], images.ctypes.data, images.nbytes, to_device, self.stream))
        if not self.context.execute_async_v3(int(self.stream)):
            raise SystemExit("the engine did not run")
        checked(copy(logits.ctypes.data, device["logits"], logits.nbytes, to_host, self.stream))
        checked(cuda.cudaStreamSynchronize(self.stream))
        for address in device.values():
            checked(cuda.cudaFree(address))
        return logits


def main() -> None:
    """Print the five most probable classes."""
    path, image = Path(sys.argv[1]), sys.argv[2]
    sidecar = json.loads(Path(f"{path}.json").read_text())
    images = preprocess(image, sidecar["preprocessing"])
    batch = sidecar["input"]["shape"][0]
    logits = Engine(path, sidecar)(np.repeat(images, max(batch, 1), axis=0))[0]
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    for index in probabilities.argsort()[::-1][:5]:
        print(f"{probabilities[index]:7.2%}  {sidecar['classes'][index] if sidecar['classes'] else index}")


if __name__ == "__main__":
    main()
