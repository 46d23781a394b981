"""What works on this machine: every backend and product is really asked, not guessed from what is installed."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from ospq_export.engines.build import BuildSettings, build
from ospq_export.engines.products import Product, known_capabilities, load, load_engine, quiet_polygraphy
from ospq_export.engines.targets import gpu_here, target_of
from ospq_export.errors import reason_of


class Diagnosis(BaseModel):
    """One thing that was tried.

    Attributes:
        name: what.
        works: whether it did what it is for.
        detail: version and what was seen, or the reason.
        fix: what to install or do where it does not work.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    works: bool
    detail: str
    fix: str = ""


def examine() -> list[Diagnosis]:
    """Try torch on CPU and CUDA, ONNX Runtime's providers, and both engine builders."""
    from ospq_export.runs.manifest import installed_versions

    versions = ", ".join(f"{name} {version}" for name, version in installed_versions().items())
    results = [Diagnosis(name="packages", works=True, detail=versions), _processor()]
    results.append(_tried("torch on CUDA", _torch_cuda, "a GPU with its driver, and torch built for CUDA"))
    for provider, fix in _PROVIDERS.items():
        results.append(_tried(f"onnxruntime {provider}", partial(_onnx_runtime, provider), fix))
    for product in Product:
        results.extend(_asked_in_a_child(product))
    return results


def _asked_in_a_child(product: Product) -> list[Diagnosis]:
    """One process takes one product, and a library that does not fit may end its process."""
    asked = [sys.executable, "-m", "ospq_export.engines.doctor", product.value]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    try:
        return [Diagnosis.model_validate(entry) for entry in json.loads(done.stdout.splitlines()[-1])]
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        detail = f"the process that asked ended with status {done.returncode}: {last}"
        return [Diagnosis(name=name, works=False, detail=detail, fix=fix) for name, fix in _asked_of(product)]


def _asked_of(product: Product) -> list[tuple[str, str]]:
    fix = f"pip install 'ospq-export[{product}]'"
    return [(f"{product} builds", fix), (f"{product} runs", f"{fix}, and a GPU with its driver")]


def examine_product(product: Product) -> list[Diagnosis]:
    """Build and run with one product, in this process."""
    attempts = (partial(_builds, product), partial(_runs, product))
    return [
        _tried(name, attempt, fix) for (name, fix), attempt in zip(_asked_of(product), attempts, strict=True)
    ]


def _processor() -> Diagnosis:
    """Instructions for 8-bit integers, and what ONNX Runtime makes of them: a product of the largest codes is computed."""
    from ospq_export.world.processor import PRECISE_KERNELS, examine_processor

    found = examine_processor()
    return Diagnosis(
        name="8-bit integer products on the CPU",
        works=found.saturates is False,
        detail=f"{found}; {found.consequence()}",
        fix=f"ONNX Runtime's session option {PRECISE_KERNELS}=1, a processor with VNNI, or weight_bits=7"
        if found.saturates
        else "",
    )


_WARNING, _FATAL = 2, 4
_PROVIDERS = {
    "CPUExecutionProvider": "pip install onnxruntime",
    "CUDAExecutionProvider": "pip install onnxruntime-gpu, CUDA and cuDNN libraries of its version, and a GPU",
    "TensorrtExecutionProvider": "pip install onnxruntime-gpu, TensorRT libraries of its version, and a GPU",
}


def _tried(name: str, attempt: Callable[[], str], fix: str) -> Diagnosis:
    try:
        return Diagnosis(name=name, works=True, detail=attempt())
    except Exception as error:
        # Whatever a missing driver or library raises is the answer here, not a fault of this program.
        return Diagnosis(name=name, works=False, detail=reason_of(error), fix=fix)


def _torch_cuda() -> str:
    import torch

    total = float(torch.ones(8, device="cuda").sum())
    if total != 8:
        raise RuntimeError(f"the GPU sums eight ones to {total}")
    target = target_of(gpu_here() or "")
    formats = f": {target.name}, {', '.join(target.formats)}" if target is not None else ""
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}{formats}"


def tiny_model() -> bytes:
    """An int8 linear layer with a softmax-free float output, `(1, 16) float32 -> (1, 4) float32`, as serialized ONNX."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    constants = {
        "scale": np.float32(0.1),
        "zero": np.int8(0),
        "codes": np.ones((16, 4), np.int8),
        "weight_scale": np.full(4, 0.5, np.float32),
        "weight_zero": np.zeros(4, np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="Q"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["a"], name="DQ"),
        helper.make_node(
            "DequantizeLinear", ["codes", "weight_scale", "weight_zero"], ["w"], name="weight", axis=1
        ),
        helper.make_node("MatMul", ["a", "w"], ["y"], name="MatMul"),
    ]
    graph = helper.make_graph(
        nodes,
        "doctor",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(model.SerializeToString())


def _onnx_runtime(provider: str) -> str:
    import numpy as np
    import onnxruntime

    if provider not in onnxruntime.get_available_providers():
        raise RuntimeError("this onnxruntime was built without it")
    # It prints and logs at length when it falls back; what counts is what it fell back to.
    onnxruntime.set_default_logger_severity(_FATAL)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            session = onnxruntime.InferenceSession(tiny_model(), options, providers=[provider])
    finally:
        onnxruntime.set_default_logger_severity(_WARNING)
    if session.get_providers()[0] != provider:
        raise RuntimeError(f"it fell back to {session.get_providers()[0]}")
    result = session.run(None, {"x": np.ones((1, 16), np.float32)})[0]
    if not np.allclose(result, 8.0):
        raise RuntimeError(f"an int8 product gave {result.ravel().tolist()} where 8 is right")
    return f"onnxruntime {onnxruntime.__version__}"


def _build_tiny(product: Product, targets: tuple[str, ...]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "doctor.onnx"
        file.write_bytes(tiny_model())
        return build(file, BuildSettings(product, compute_capabilities=targets)).plan


def _builds(product: Product) -> str:
    trt = load(product)
    targets = known_capabilities(product)
    plan = _build_tiny(product, tuple(targets[-1:]))
    known = f", targets {', '.join(targets)}" if targets else ""
    return f"{product} {trt.__version__}, an engine of {len(plan)} bytes{known}"


def _runs(product: Product) -> str:
    """Build for this machine's GPU, load, and compute an int8 product on it."""
    trt = load(product)
    seen = _torch_cuda()
    import numpy as np
    from polygraphy.backend.trt import TrtRunner

    with quiet_polygraphy(), TrtRunner(load_engine(product, _build_tiny(product, ()))) as runner:
        found = runner.infer({"x": np.ones((1, 16), np.float32)})
    result = found["y"].flatten().tolist()
    if any(abs(value - 8.0) > 1e-3 for value in result):
        raise RuntimeError(f"an int8 product gave {result} where 8 is right")
    return f"{product} {trt.__version__} on {seen}"


if __name__ == "__main__":
    sys.stdout.write(
        json.dumps([found.model_dump() for found in examine_product(Product(sys.argv[1]))]) + "\n"
    )
