"""Check a quantized network on the device that will run it: build it there, compare it with its reference, time it.

Needs Python 3.8 or later, numpy and tensorrt (8.6 to 11), nothing else. In the folder that the bundle was unpacked to:

    python3 check.pyz

It prints how far the device is from the reference and how fast it is, and writes result.json. On the machine where the
network was quantized, `ospq-export validate RUN --device-result result.json` makes the report of it.

Exit status: 0 within the noise, 1 not, 2 bad input.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
from runtimes import RUNTIMES, Arrays, BadInput

DEVICE, FLOAT, FAKE_QUANT, FAKE_QUANT_FP16 = "device", "float", "fake_quant", "fake_quant-fp16"
SHOWN, WARM_UP, FEWEST, MOST, SECONDS = 10, 5, 10, 200, 2.0
# Twice what other executions of the reference differ by is noise; a share of the images may be further off (ospq-export's rule).
HEADROOM, ALLOWED = 2.0, 0.005
# The last digits of float32 are no finding.
DIGITS = 1e-5
# A float network in FP16 or TF32 is a thousandth off; one that is so far off is broken.
BROKEN = 0.05


class Bundle:
    """The files beside this script; each is what bundle.json says it is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.facts = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
            for name, digest in self.facts["files"].items():
                if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
                    raise BadInput("%s is not the bundle's: unpack it again" % name)
            self.images = np.load(str(folder / self.facts["images"]))
            self.labels = np.load(str(folder / self.facts["labels"]))
            held = self.facts["outputs"].items()
            self.outputs = {e: {n: np.load(str(folder / f)) for n, f in o.items()} for e, o in held}
        except (OSError, ValueError, KeyError) as error:
            raise BadInput("the bundle cannot be read: %r" % error) from error


def run_all(runtime: Any, images: Any, batch: int) -> Arrays:
    """Outputs of all images, in batches; the last one is filled up where the file's batch is fixed."""
    size: int = runtime.fixed or batch
    parts: List[Arrays] = []
    for start in range(0, len(images), size):
        part = images[start : start + size]
        empty = np.zeros((size - len(part) if runtime.fixed else 0, *part.shape[1:]), np.float32)
        found = runtime.run(np.concatenate([part, empty]))
        parts.append({name: values[: len(part)].copy() for name, values in found.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def errors_of(found: Any, reference: Any) -> Any:
    """Relative error of each image, |found - reference| / |reference|."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (found, reference))
    error = np.linalg.norm(a - b, axis=1) / np.maximum(np.linalg.norm(b, axis=1), 1e-30)
    return np.where(np.isfinite(error), error, np.inf)


def two_classes(logits: Any) -> Any:
    """A single logit stands for two classes."""
    return np.concatenate([np.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits


def compare_outputs(bundle: Bundle, found: Arrays, reference: str) -> List[str]:
    """Print how far every output is from the reference's; findings where that is more than noise."""
    findings = []
    for name, expected in bundle.outputs[reference].items():
        error, noise = errors_of(found[name], expected), bundle.facts["noise"][reference][name]
        middle, most = (HEADROOM * noise[key] + DIGITS for key in ("mean", "largest"))
        figures = (name, 100 * np.median(error), 100 * error.max())
        text = "%s: %.3g %% off in the median image, %.3g %% at most" % figures
        print("  %s (noise: %.3g %%, %.3g %%)" % (text, 100 * middle, 100 * most))
        # A rounding edge moves few images, a wrong scale all.
        if np.median(error) > middle or (error > most).sum() > max(1, ALLOWED * len(error)):
            findings.append("%s, which is more than noise" % text)
    return findings


def compare_decisions(bundle: Bundle, found: Arrays, reference: str) -> List[str]:
    """Print what a classifier decides otherwise than its reference, with margins; findings where that is more than noise."""
    ((name, expected),) = bundle.outputs[reference].items()
    margin = bundle.facts["margin"][reference]
    ours, theirs = two_classes(found[name]), two_classes(expected)
    before, after = theirs.argmax(1), ours.argmax(1)
    for who, logits in ((FLOAT, bundle.outputs[FLOAT][name]), (reference, expected), (DEVICE, found[name])):
        if (bundle.labels >= 0).all():
            hits = two_classes(logits).argmax(1) == bundle.labels
            print("  Top-1 of %s: %.2f %%" % (who, 100 * hits.mean()))
    flips, ordered = np.flatnonzero(before != after), np.sort(theirs, 1)
    lead = ordered[:, -1] - ordered[:, -2]
    for i in flips[:SHOWN]:
        print("  flip: %s, %d -> %d, margin %.3g" % (bundle.facts["ids"][i], before[i], after[i], lead[i]))
    beyond = int((lead[flips] > margin).sum())
    text = "%d of %d predictions differ, %d of them with a margin above the noise of %.3g"
    text = text % (len(flips), len(before), beyond, margin)
    print("  " + text)
    return [text] if beyond > max(1, ALLOWED * len(before)) else []


def swapped_rows(found: Any, expected: Any, size: int, noise: float) -> List[str]:
    """Rows of batches that hold what another row should: beyond the noise, and four times closer to that one's reference."""
    swapped = []
    for start in range(0, len(expected) - size + 1, size):
        rows = expected[start : start + size]
        for i in range(size):
            errors = errors_of(found[start + i][None].repeat(size, 0), rows)
            j = int(errors.argmin())
            if errors[i] > noise and 4 * errors[j] < errors[i]:
                swapped.append("row %d holds %d's" % (i, j))
    return sorted(set(swapped))


def compare_rows(bundle: Bundle, runtime: Any, found: Arrays, reference: str, batch: int) -> List[str]:
    """Findings where outputs depend on the place in the batch, or on the run."""
    size = min(runtime.fixed or batch, len(bundle.images))
    findings: List[str] = []
    same = np.repeat(bundle.images[:1], runtime.fixed or size, 0)
    first, again = runtime.run(same), runtime.run(same)
    for name, expected in bundle.outputs[reference].items():
        noise = HEADROOM * bundle.facts["noise"][reference][name]["largest"] + DIGITS
        rows = swapped_rows(found[name], expected, size, noise)
        if rows:
            findings.append("rows of a batch are swapped in %s: %s" % (name, ", ".join(rows[:4])))
        spread = float(errors_of(first[name], first[name][:1].repeat(len(same), 0)).max())
        if spread > noise:
            findings.append("%s of one image differs by %.3g %% from row to row" % (name, 100 * spread))
        if not np.array_equal(first[name], again[name]):
            findings.append("%s differs from run to run" % name)
    return findings


def measure(runtime: Any, name: str, images: Any, batch: int) -> Dict[str, Any]:
    """Milliseconds of a batch from host to host: median and 90th percentile after a warm-up."""
    size = runtime.fixed or batch
    part = images[np.arange(size) % len(images)]
    seconds: List[float] = []
    for _ in range(WARM_UP):
        runtime.run(part)
    while len(seconds) < FEWEST or (len(seconds) < MOST and sum(seconds) < SECONDS):
        started = time.perf_counter()
        runtime.run(part)
        seconds.append(time.perf_counter() - started)
    median, high = float(np.median(seconds)), float(np.percentile(seconds, 90))
    print("  %s: %.3f ms for a batch of %d, 90 %% below %.3f ms" % (name, 1e3 * median, size, 1e3 * high))
    result = {"name": name, "batch_size": size, "median_ms": 1e3 * median, "p90_ms": 1e3 * high}
    return dict(result, images_per_second=size / median, calls=len(seconds))


def encoded(values: Any) -> Dict[str, Any]:
    """An array as JSON, little-endian."""
    plain = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    text = base64.b64encode(plain.tobytes()).decode("ascii")
    return {"dtype": str(values.dtype), "shape": list(values.shape), "base64": text}


def check(bundle: Bundle, runtime: str, batch: int) -> Dict[str, Any]:
    """All of it; returns what result.json holds."""
    facts, shape = bundle.facts, tuple(bundle.images.shape[1:])
    print("%s (%s), %d images" % (facts["model"], facts["recipe"], len(bundle.images)))
    engine = RUNTIMES[runtime](bundle.folder / facts["network"], batch, shape)
    print("%s on %s" % (engine.version, engine.device))
    started = time.perf_counter()
    found = run_all(engine, bundle.images, batch)
    seconds = time.perf_counter() - started
    if set(found) != set(bundle.outputs[FAKE_QUANT]):
        raise BadInput("%s returns %s" % (facts["network"], ", ".join(found)))
    half = facts["float_type"] == "fp16" or engine.half
    reference = FAKE_QUANT_FP16 if half and FAKE_QUANT_FP16 in bundle.outputs else FAKE_QUANT
    print("%s against %s:" % (facts["network"], reference))
    findings = compare_decisions(bundle, found, reference) if facts["task"] == "classify" else []
    findings += compare_outputs(bundle, found, reference)
    findings += compare_rows(bundle, engine, found, reference, batch)
    print("latency, host to host:")
    latency = [measure(engine, DEVICE, bundle.images, batch)]
    device = {"runtime": engine.version, "device": engine.device, "bytes": str(engine.size)}
    device.update(file=facts["network"], batch=str(engine.fixed or batch))
    device.update(python=platform.python_version(), numpy=np.__version__)
    del engine
    plain = RUNTIMES[runtime](bundle.folder / facts["baseline"], batch, shape)
    latency.append(measure(plain, "%s, float" % DEVICE, bundle.images, batch))
    print("%s against %s:" % (facts["baseline"], FLOAT))
    for name, values in run_all(plain, bundle.images, batch).items():
        error = float(errors_of(values, bundle.outputs[FLOAT][name]).mean())
        print("  %s: %.3g %% off on average" % (name, 100 * error))
        if not error <= BROKEN:
            findings.append("the float baseline is wrong here: %s is %.3g %% off" % (name, 100 * error))
    outputs = dict(bundle.outputs, **{DEVICE: found})
    arrays = {e: {n: encoded(v) for n, v in o.items()} for e, o in outputs.items()}
    result = {
        "schema_version": 1,
        "bundle": facts,
        "device": device,
        "reference": reference,
        "seconds": seconds,
    }
    return dict(result, outputs=arrays, labels=encoded(bundle.labels), latency=latency, findings=findings)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runtime", choices=sorted(RUNTIMES), default="tensorrt")
    parser.add_argument(
        "--batch", type=int, default=8, help="images at once, where the file leaves that free"
    )
    parser.add_argument("--out", type=Path, default=None, help="default: result.json beside this script")
    given = parser.parse_args()
    folder = Path(sys.argv[0]).resolve().parent
    out = given.out or folder / "result.json"
    try:
        result = check(Bundle(folder), given.runtime, max(given.batch, 1))
        partial = out.with_name("." + out.name + ".tmp")
        partial.write_text(json.dumps(result), encoding="utf-8")
        partial.replace(out)
    except (BadInput, OSError) as error:
        print("error: %s" % error, file=sys.stderr)
        return 2
    for finding in result["findings"]:
        print("found: " + finding)
    print("%s: %s" % (out, "not what the reference is" if result["findings"] else "within the noise"))
    return 1 if result["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
