"""A network with more than 2 GB of weights, for real: calibrated, exported, linted, validated; sizes and peak memory.

    python benchmarks/large.py                       # 574 M random weights in one block: 2.3 GB; needs 24 GB of memory
    python benchmarks/large.py --width 1536          # the same path with 0.1 GB, to try it out
    python benchmarks/large.py --engine              # and TensorRT-RTX builds an engine of it

A vision transformer of one very wide block, weights and images random, no reconstruction: what is measured is how the files are
written and read where one protobuf message cannot hold them, not accuracy. Every step is a command of its own, and its peak is
that of the whole process. At the end `lint` reads a file that is one message of 2.1 GB: more than what serializes
it again can take. Writes a row of
benchmarks/rows/large.jsonl.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lib.rows import make_parser

CLI = (sys.executable, "-m", "ospq_export.cli")
CLASSES, PER_CLASS, SIDE = 4, 2, 32
# Below protobuf's 2**31 - 1, so that the file is sound, and too large for a copy with anything more in it.
ONE_MESSAGE = 2_140_000_000


def write_images(folder: Path) -> None:
    """Random pictures, a few per class."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for index in range(CLASSES * PER_CLASS):
        path = folder / f"c{index % CLASSES}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(path)


def write_one_message(path: Path, size: int) -> None:
    """A quantized linear layer whose float bias fills one protobuf message up to `size` bytes."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from ospq_export.engines.doctor import tiny_model

    model = onnx.load_from_string(tiny_model())
    rows = size // 16
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((rows, 4), np.float32), "table"))
    model.graph.node.append(helper.make_node("Add", ["y", "table"], ["z"], name="Add"))
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [rows, 4]))
    onnx.save_model(model, str(path))


def run(words: list[str], log: Path) -> dict[str, Any]:
    """One command as a process of its own: exit status, seconds, peak resident memory in bytes, last line."""
    started = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    lines = [line.rstrip() for line in log.read_text().splitlines() if line.strip()]
    return {
        "exit": os.waitstatus_to_exitcode(status),
        "seconds": round(time.perf_counter() - started, 1),
        # Linux counts in KiB.
        "peak_bytes": usage.ru_maxrss * 1024,
        "last_line": lines[-1][:300] if lines else "",
    }


def commands(folder: Path, width: int, engine: bool) -> dict[str, list[str]]:
    """The path, by the step's name."""
    run_directory, data = str(folder / "run"), str(folder / "images")
    shape = f"img_size={SIDE} patch_size=16 depth=1 embed_dim={width} num_heads={width // 64} num_classes={CLASSES}"
    settings = [f"reconstruction.{s}" for s in ("iterations=0", "batch_size=8", "refinement_images=0")]
    settings += ["equalization=none", "slicing=block", "calibration_images=8", "observation_images=8"]
    sets = [word for setting in settings for word in ("--set", setting)]
    target = ["--engine", "tensorrt-rtx", "--compute-capability", "SM89"] if engine else ["--fp16"]
    files = ("model_fp32.onnx", "model.onnx", "model_qdq_fp16.onnx")
    return {
        "calibrate": [
            *(*CLI, "calibrate", "vit_tiny_patch16_224", "--model-kwargs", shape, "--random-weights"),
            *("--data", data, "--out", run_directory, "--input-size", f"3,{SIDE},{SIDE}", "-q", *sets),
        ],
        "export": [*CLI, "export", run_directory, "-q", *target],
        **{f"lint {name}": [*CLI, "lint", f"{run_directory}/{name}"] for name in files},
        "validate": [*CLI, "validate", run_directory, "--data", data, "--batch-size", "8", "-q"],
        "write one message": [sys.executable, __file__, "--one-message", str(folder / "message.onnx")],
        "lint one message": [*CLI, "lint", str(folder / "message.onnx")],
    }


def measure(width: int, engine: bool, scratch: Path | None) -> dict[str, Any]:
    """The row of one width; stops at the first step that does not do what it is for."""
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        write_images(folder / "images")
        steps: dict[str, Any] = {}
        for step, words in commands(folder, width, engine).items():
            steps[step] = run(words, folder / "log")
            print(f"{step}: {steps[step]}", flush=True)
            # Without labels that mean anything, and with lint's warnings, 1 and 3 are answers, too.
            if steps[step]["exit"] not in ((0, 1, 3) if step == "validate" else (0,)):
                print((folder / "log").read_text(), file=sys.stderr)
                break
        files = {p.name: p.stat().st_size for p in sorted((folder / "run").glob("*")) if p.is_file()}
    weights = files.get("float.safetensors", 0)
    # Not before: what this process holds when it starts another counts as the other's.
    from lib.rows import origin

    return {
        "width": width,
        "weights": weights,
        "files": files,
        "quantized_over_float": round(_onnx_bytes(files, "model.onnx") / max(1, weights), 4),
        "steps": steps,
        "peak_over_weights": {k: round(s["peak_bytes"] / max(1, weights), 2) for k, s in steps.items()},
        **origin(),
    }


def _onnx_bytes(files: dict[str, int], name: str) -> int:
    return files.get(name, 0) + files.get(f"{name}.data", 0)


def main() -> None:
    """Command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--width", type=int, default=6912, help="of the block; a multiple of 64")
    parser.add_argument("--engine", action="store_true", help="build an engine for SM89, too")
    parser.add_argument("--folder", type=Path, help="where the run directory lies meanwhile: 12 GB")
    parser.add_argument("--one-message", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one_message is not None:
        write_one_message(args.one_message, ONE_MESSAGE)
        return
    row = measure(args.width, args.engine, args.folder)
    from lib.rows import LARGE

    LARGE.put(row)


if __name__ == "__main__":
    main()
