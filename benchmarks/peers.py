"""Our int8 ONNX file beside its peers' of the same float network; writes docs/peers.md.

    python benchmarks/peers.py                       # all: makes a virtual environment for modelopt in benchmarks/.modelopt
    python benchmarks/peers.py --network demo-vit

Peers: the FP32 file, `onnxruntime.quantization.quantize_static` (QDQ with int8, QOperator with uint8 activations), and
nvidia-modelopt's ONNX quantization, whose pins conflict with ours. All are quantized from the same FP32 file and images.
Latency: ONNX Runtime on the CPU, one thread, all sessions in one process, called in turn; the median of each over FP32's, in
processor time, so that a busy machine gives the same. What TensorRT-RTX compiles is read from the plan it builds without a
GPU. Interrupted runs go on: a row per network in benchmarks/rows/peers.jsonl.
"""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from lib.networks import Quantized, demo_sample, quantize, random_images
from lib.onnx_tools import TARGET, fusion_cells
from lib.onnx_tools import compiled as compiled_engine
from lib.rows import BENCHMARKS, DOCS, PEERS, make_parser, origin, percent, table
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from rich.console import Console

from ospq_export.errors import InputError
from ospq_export.formats.choice import integers
from ospq_export.models.timm import ModelSpec
from ospq_export.onnx.kernels import integer_kernels

DOCUMENT, PEER_ENVIRONMENT = DOCS / "peers.md", BENCHMARKS / ".modelopt"
MODELOPT = "nvidia-modelopt[onnx]==0.47.0"
BATCHES, W8A8 = (1, 8), integers(8, 8)
FP32 = "FP32"
_MIB = 1 << 20
_MODELOPT_SCRIPT = """
import sys
import numpy as np
from modelopt.onnx.quantization import quantize
source, images, out, floats = sys.argv[1:]
quantize(source, quantize_mode="int8", calibration_data={"images": np.load(images)}, calibration_method="max",
         calibration_eps=["cpu"], high_precision_dtype=floats, output_path=out)
"""


def demo_vit() -> tuple[Quantized, torch.Tensor]:
    """The packaged ViT and 32 of its calibration images."""
    spec, input_size, images = demo_sample("vit")
    return quantize(spec, input_size, W8A8, images), images


def vit_small() -> tuple[Quantized, torch.Tensor]:
    """ViT-S at 224 px with random weights, and 8 random images."""
    images = random_images(8, (3, 224, 224))
    return quantize(ModelSpec(name="vit_small_patch16_224"), (3, 224, 224), W8A8, images), images


NETWORKS: dict[str, Callable[[], tuple[Quantized, torch.Tensor]]] = {
    "demo-vit": demo_vit,
    "vit-s-224": vit_small,
}


class _Reader(CalibrationDataReader):
    def __init__(self, images: np.ndarray) -> None:
        self.batches = iter([{"images": images}])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def modelopt_python() -> str:
    """The interpreter of modelopt's own environment, made where it is missing; torch is taken from this one."""
    python = PEER_ENVIRONMENT / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(PEER_ENVIRONMENT)], check=True)
        own = next((PEER_ENVIRONMENT / "lib").iterdir()) / "site-packages" / "zz_parent.pth"
        own.write_text(sysconfig.get_path("purelib") + "\n")
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", MODELOPT]
        subprocess.run(install, check=True)
    return str(python)


def make_files(network: str, folder: Path) -> tuple[dict[str, Path], dict[str, str], np.ndarray]:
    """All forms of a network; those that could not be made, with the reason; the images (N, C, H, W) float32."""
    quantized, images = NETWORKS[network]()
    pixels = images.numpy()
    source, prepared = folder / "fp32.onnx", folder / "prepared.onnx"
    quantized.write_float(source, batch_size=None)
    files, failures = {FP32: source}, {}
    for name, layout in (("ours", "int8"), ("ours, uint8 activations", "uint8")):
        files[name] = folder / f"ours_{layout}.onnx"
        quantized.write(files[name], half=False, batch_size=None, activations=layout)
    files["ours, FP16 around"] = folder / "ours_half.onnx"
    quantized.write(files["ours, FP16 around"], half=True, batch_size=None)
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    for name, form, activation in (
        ("quantize_static, QDQ", QuantFormat.QDQ, QuantType.QInt8),
        ("quantize_static, QOperator", QuantFormat.QOperator, QuantType.QUInt8),
    ):
        files[name] = folder / f"static_{form.name}.onnx"
        quantize_static(
            str(prepared),
            str(files[name]),
            _Reader(pixels),
            quant_format=form,
            per_channel=True,
            activation_type=activation,
            weight_type=QuantType.QInt8,
            # What TensorRT can take: products only, no integer biases; the other form as ONNX Runtime likes it.
            op_types_to_quantize=["MatMul", "Gemm", "Conv"] if form is QuantFormat.QDQ else None,
            extra_options={
                "ActivationSymmetric": activation is QuantType.QInt8,
                "WeightSymmetric": True,
                "QuantizeBias": form is not QuantFormat.QDQ,
            },
        )
    np.save(folder / "images.npy", pixels)
    for name, floats in (("modelopt", "fp32"), ("modelopt, FP16 around", "fp16")):
        out = folder / f"modelopt_{floats}.onnx"
        try:
            arguments = [str(source), str(folder / "images.npy"), str(out), floats]
            command = [modelopt_python(), "-c", _MODELOPT_SCRIPT, *arguments]
            subprocess.run(command, check=True, capture_output=True, text=True)
            files[name] = out
        except subprocess.CalledProcessError as error:
            lines = (error.stderr or str(error)).strip().splitlines()
            failures[name] = lines[-1] if lines else str(error)
    return files, failures, pixels


def latencies(files: dict[str, Path], pixels: np.ndarray, batch: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of processor time of one call on one thread, which is the latency of an otherwise idle core.

    The sessions take turns in random order; time on the clock would count whatever else the machine does.
    """
    sessions, feed = {}, {"images": np.resize(pixels, (batch, *pixels.shape[1:]))}
    for name, file in files.items():
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        sessions[name] = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    taken: dict[str, list[float]] = {name: [] for name in sessions}
    order, shuffler = list(sessions), random.Random(0)
    for step in range(rounds + 2):
        shuffler.shuffle(order)
        for name in order:
            started = time.process_time_ns()
            sessions[name].run(None, feed)
            if step >= 2:
                taken[name].append(1e-6 * (time.process_time_ns() - started))
    return {name: statistics.median(values) for name, values in taken.items()}


def compiled(file: Path, folder: Path) -> tuple[str, str]:
    """Int8 products and fused attentions of a file's engine; the builder's reason where it refuses."""
    model = onnx.load(str(file))
    static = folder / "static.onnx"
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    for index, node in enumerate(model.graph.node):
        # The plan is read back by node names.
        node.name = f"{node.name or node.op_type}#{index}"
    del model.graph.value_info[:]
    onnx.save(model, str(static))
    try:
        return fusion_cells(compiled_engine(static, folder).fusion)
    except InputError as error:
        return f"refused: {error!s}", "-"


def measure(network: str, rounds: int) -> dict[str, Any]:
    """Everything about one network."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files, failures, pixels = make_files(network, folder)
        runnable = {name: file for name, file in files.items() if "FP16" not in name}
        times = {str(batch): latencies(runnable, pixels, batch, rounds) for batch in BATCHES}
        rows = {}
        for label, file in files.items():
            kernels = integer_kernels(file) if label != FP32 else None
            rows[label] = {
                "bytes": file.stat().st_size,
                "ms": {batch: by_name.get(label) for batch, by_name in times.items()},
                "onnxruntime": percent(kernels.integer_products, kernels.products) if kernels else "-",
                "tensorrt": compiled(file, folder) if label != FP32 else ("-", "-"),
            }
            Console(width=250).print(network, label, rows[label])
    found = origin()
    found["versions"]["modelopt"] = MODELOPT
    return {"network": network, "rows": rows, "failures": failures, **found}


def write_page() -> None:
    """docs/peers.md from the results at hand."""
    results = PEERS.rows()
    lines, failures = [], []
    for result in results:
        floats = result["rows"][FP32]["ms"]
        for label, row in result["rows"].items():
            ratios = [
                "-" if row["ms"][batch] is None else f"{row['ms'][batch] / floats[batch]:.2f}"
                for batch in map(str, BATCHES)
            ]
            size = f"{row['bytes'] / _MIB:.1f}"
            plan = row["tensorrt"]
            if plan[0].startswith("refused"):
                failures.append(
                    [result["network"], label, plan[0].split(" Please set")[0].split(" (/")[0][:240]]
                )
                plan = ["refused", "-"]
            lines.append([result["network"], label, size, *ratios, row["onnxruntime"], *plan])
        failures += [[result["network"], name, reason] for name, reason in result["failures"].items()]
    machines = "; ".join(dict.fromkeys(result["machine"] for result in results))
    header = ["network", "file", "MiB", *(f"latency, batch {b}" for b in BATCHES)]
    header += ["integer products in ORT", "Int8 products in TensorRT-RTX", "fused attentions"]
    text = _INTRO.format(target=TARGET) + table(header, lines)
    text += f"\nMeasured by `benchmarks/peers.py` on {machines}; onnxruntime {onnxruntime.__version__}, {MODELOPT}.\n"
    if failures:
        text += "\n## What could not be built\n\n" + table(["network", "file", "reason"], failures)
    DOCUMENT.write_text(text)


_INTRO = """# Beside other quantizers

This project's INT8 ONNX file beside those of ONNX Runtime's `quantize_static` and of nvidia-modelopt, made of the same float
network. *demo-vit* is the packaged network; ViT-S has random weights.

- *Latency* is that of ONNX Runtime on a CPU, one thread, over that of FP32: below 1 is faster. It says nothing about GPUs.
- The last two columns are read from the engine that TensorRT-RTX compiles for {target}, batch 1, without a GPU.
- Files with FP16 around are for TensorRT. A QOperator file consists of integer operators, so there is nothing to count in it.

"""


def main() -> None:
    """Command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--network", choices=NETWORKS, help="default: all")
    parser.add_argument("--rounds", type=int, default=30, help="timed calls of each file at each batch size")
    parser.add_argument("--again", action="store_true", help="measure also what is there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for network in [args.network] if args.network else NETWORKS:
        if args.again or PEERS.find(network=network) is None:
            PEERS.put(measure(network, args.rounds))
        write_page()


if __name__ == "__main__":
    main()
