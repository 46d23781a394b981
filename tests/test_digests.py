"""Codes, scales, graphs and ONNX bytes are those of before formats, tasks and executions were objects: digests.json.

    python tests/test_digests.py > tests/digests.json      # all four; digests.json is of commit 5130f7e
    python tests/test_digests.py "swin w4a4"

Float sums depend on the instructions that a processor has. The libraries are therefore told to use what all have, which has to
be said before torch is imported: in a process of its own.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SCORES = "Top-1: "
COMMON_ARITHMETIC = {
    "OMP_NUM_THREADS": "1",
    "MKL_CBWR": "COMPATIBLE",
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def tensors_digest(path: Path) -> str:
    """Of names, types, shapes and values; not of the file's header, which may say more one day."""
    from safetensors.numpy import load_file

    parts = sorted(load_file(path).items())
    return digest(b"".join(f"{n} {t.dtype} {t.shape}".encode() + t.tobytes() for n, t in parts))


def run_digests(model: str, recipe: str, folder: Path) -> dict[str, str]:
    from conftest import calibrated_demo

    from ospq_export.export import export
    from ospq_export.export.jobs import Extras

    run = folder / f"{model}-{recipe}"
    calibrated = calibrated_demo(model, recipe, run, "slicing=block", "reconstruction.refinement_images=8")
    extras = Extras(fp16=True, int4=recipe == "w4a4", uint8_activations=True, uint8_input=True)
    export(run, extras=extras)
    manifest = calibrated.manifest
    result = {
        "graph": manifest.graph_fingerprint,
        "slices": digest(json.dumps([(s.name, s.start, s.end) for s in manifest.slices]).encode()),
        "float.safetensors": tensors_digest(run / "float.safetensors"),
        "quantized.safetensors": tensors_digest(run / "quantized.safetensors"),
    }
    for path in sorted(run.glob("*.onnx")):
        result[path.name] = digest(path.read_bytes())
    return result


def top1(run: Path) -> float:
    """Of the fake-quantized network, percent of 300 test images."""
    import torch

    from ospq_export.demo import demo_images
    from ospq_export.runs.run import Run

    opened = Run.open(run)
    images = demo_images("test", opened.manifest.data)
    (batch,) = images.batches(300, images.choose(300), 0)
    with torch.inference_mode():
        found = opened.fake_quant_network()(batch.images).argmax(1)
    return float((found == batch.labels).double().mean() * 100)


def main() -> None:
    os.environ.update(COMMON_ARITHMETIC)
    names = sys.argv[1:] or ["vit w8a8", "vit w4a4", "swin w8a8", "swin w4a4"]
    with tempfile.TemporaryDirectory() as folder:
        digests = {name: run_digests(*name.split(), Path(folder)) for name in names}
        scores = {name: top1(Path(folder) / name.replace(" ", "-")) for name in names}
    sys.stdout.write(json.dumps(digests, indent=2) + "\n")
    # Not the last lines there: libraries have their say when the process ends.
    sys.stderr.write(f"{SCORES}{json.dumps(scores)}\n")


@pytest.mark.slow
def test_a_run_and_its_files_are_the_same_to_the_last_bit():
    """One network and recipe with every kind of file; what is the same predicts as well."""
    name = "swin w4a4"
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, __file__, name]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)[name] == json.loads((HERE / "digests.json").read_text())[name]
    (scores,) = [line for line in done.stderr.splitlines() if line.startswith(SCORES)]
    assert json.loads(scores.removeprefix(SCORES))[name] > 75


if __name__ == "__main__":
    main()
