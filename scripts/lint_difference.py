"""Hold lint's prediction to what TensorRT-RTX's parser and builder make of drawn graphs.

    python scripts/lint_difference.py FIRST COUNT [--output FILE] [--record]

Each seed gives one graph (scripts/lint_graphs.py). It is built for SM89, and every product's kernel is looked up in the plan.
Three kinds of disagreement are counted: false errors (lint says refused, the builder takes it), missed refusals, and products
whose precision is another. Graphs that the builder takes but reads differently (uint8 as int8) are errors of lint's that are not
refusals: they are counted apart. With --record the summary is kept in benchmarks/rows/lint.jsonl.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from lib.rows import LINT, origin

from lint_graphs import draw
from ospq_export.engines.build import BuildSettings, build
from ospq_export.engines.plan import PlanLayer, layers_from_log
from ospq_export.engines.products import Message, Product
from ospq_export.errors import InputError
from ospq_export.onnx.lint import Prediction, predict

CRASH = "the builder's process ended"
TARGET = "SM89"
PRODUCTS = {"MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum"}
_FORMATS = {"Int8": "int8", "FP8": "fp8", "FP4E2M1": "fp4", "FP4": "fp4"}


@dataclass(frozen=True)
class Outcome:
    """What the builder made of a file: why it refused it, or the precision of every product by node name."""

    refused: str
    products: dict[str, str]


@dataclass(frozen=True)
class Case:
    """One graph: its seed, what differs (empty: nothing), what was seen, what was predicted, lint's rules."""

    seed: int
    difference: str
    seen: str
    predicted: str
    rules: tuple[str, ...]


def observe(path: Path, target: str = TARGET) -> Outcome:
    """Build a file, and read the precision of its products from the plan."""
    try:
        built = build(path, BuildSettings(Product.TENSORRT_RTX, compute_capabilities=(target,)))
    except InputError as error:
        return Outcome(str(error), {})
    return Outcome("", {name: kind for name, kind in _kinds(built.log).items() if name in _products(path)})


def _products(path: Path) -> set[str]:
    model = onnx.load(str(path), load_external_data=False)
    lists = [model.graph.node, *(function.node for function in model.functions)]
    found: set[str] = set()
    while lists:
        for node in lists.pop():
            lists.extend(a.g.node for a in node.attribute if a.HasField("g"))
            if node.op_type in PRODUCTS:
                found.add(node.name)
    return found


def _kinds(log: Iterable[Message]) -> dict[str, str]:
    kinds: dict[str, str] = {}
    for layer in layers_from_log(message.text for message in log):
        kind = _kind(layer)
        for name in layer.onnx:
            own = name.split(" | ")[0]
            kinds[own] = kind if kinds.get(own, "float") == "float" else kinds[own]
    return kinds


def _kind(layer: PlanLayer) -> str:
    """Two operands in one format below 16 bits: a fused residual, a scale or a bias is a further input in float.

    FP4 operands have block scales in FP8.
    """
    count = Counter(_FORMATS.get(name, "") for name in (*layer.inputs, *layer.constants))
    if not layer.multiplies:
        return "float"
    lone = len(layer.inputs) == 1 and not layer.constants
    return next((kind for kind in ("int8", "fp4", "fp8") if count[kind] >= (1 if lone else 2)), "float")


def compare(seed: int, model: onnx.ModelProto, folder: Path) -> Case:
    """One graph."""
    path = folder / "drawn.onnx"
    onnx.save(model, str(path))
    try:
        prediction = predict(path)
    except InputError as error:
        return Case(seed, "", "", f"invalid: {error}", ())
    outcome = observe(path)
    return Case(
        seed,
        difference(prediction, outcome),
        outcome.refused or json.dumps(outcome.products),
        "refused" if prediction.refused else json.dumps(prediction.products),
        tuple(sorted({finding.rule for finding in prediction.findings})),
    )


def difference(prediction: Prediction, outcome: Outcome) -> str:
    """Which kind of disagreement there is; empty where none."""
    if outcome.refused:
        return "" if prediction.refused else "missed refusal"
    if prediction.refused:
        return "false error"
    for name, kind in outcome.products.items():
        predicted = prediction.products.get(name)
        if predicted != kind:
            return f"false {predicted}" if predicted == "float" else f"false {predicted}, runs in {kind}"
    return ""


def run(seeds: Iterable[int]) -> Iterator[Case]:
    """All seeds in a process of its own, which is started again where the builder takes it down."""
    waiting = list(seeds)
    context = multiprocessing.get_context("spawn")
    while waiting:
        receiver, sender = context.Pipe(duplex=False)
        worker = context.Process(target=_work, args=(waiting, sender))
        worker.start()
        sender.close()
        done = 0
        try:
            while done < len(waiting):
                yield receiver.recv()
                done += 1
        except EOFError:
            yield _crashed(waiting[done])
            done += 1
        worker.join()
        waiting = waiting[done:]


def _crashed(seed: int) -> Case:
    """A graph that ended the builder's process: a refusal, of a kind."""
    prediction = predict(draw(seed))
    shown = "refused" if prediction.refused else json.dumps(prediction.products)
    rules = tuple(sorted({finding.rule for finding in prediction.findings}))
    return Case(seed, difference(prediction, Outcome(CRASH, {})), CRASH, shown, rules)


def _work(seeds: list[int], sender: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            sender.send(compare(seed, draw(seed), Path(folder)))
    sender.close()


def summary(cases: list[Case], first: int) -> dict[str, Any]:
    """What is kept of a run: versions, seeds, counts, and every disagreement."""
    valid = [case for case in cases if not case.predicted.startswith("invalid")]
    kinds = Counter(case.difference.split(",")[0] for case in valid if case.difference)
    return {
        "target": TARGET,
        "seeds": [first, first + len(cases)],
        "graphs": len(valid),
        "invalid_onnx": sum(case.predicted.startswith("invalid") for case in cases),
        "builder_crashed": [case.seed for case in cases if case.seen == CRASH],
        "refused": sum(case.predicted == "refused" for case in valid),
        "products": dict(
            Counter(k for c in valid if c.seen.startswith("{") for k in json.loads(c.seen).values())
        ),
        "read_differently": sum(
            bool({"datatype", "blocks", "int4-blocks"} & set(c.rules)) and c.predicted != "refused"
            for c in valid
        ),
        "rules": dict(Counter(rule for case in valid for rule in case.rules)),
        "disagreements": dict(kinds),
        "cases": [asdict(case) for case in valid if case.difference],
        **origin(),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("first", type=int)
    parser.add_argument("count", type=int)
    parser.add_argument("--output", type=Path)
    parser.add_argument(
        "--record", action="store_true", help="keep the summary in benchmarks/rows/lint.jsonl"
    )
    arguments = parser.parse_args()
    cases: list[Case] = []
    for case in run(range(arguments.first, arguments.first + arguments.count)):
        cases.append(case)
        # A long run can be looked at while it goes on.
        if len(cases) == arguments.count or (arguments.output and len(cases) % 20 == 0):
            report = json.dumps(summary(cases, arguments.first), indent=1) + "\n"
            (arguments.output or Path("/dev/stdout")).write_text(report)
    if arguments.record:
        LINT.put(summary(cases, arguments.first))


if __name__ == "__main__":
    main()
