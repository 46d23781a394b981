"""A network on its way through the whole tool: captured, written down and rebuilt, quantized, exported, run by ONNX Runtime."""

import json
from dataclasses import dataclass
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, fx, nn

from ospq_export.calibrate.observe import observe
from ospq_export.export.lower.graph import lower
from ospq_export.formats.choice import integers
from ospq_export.graph.capture import capture
from ospq_export.graph.insertion import insert_quantizers
from ospq_export.graph.quantizers import Mode, QuantizedGraph
from ospq_export.graph.serialize import describe, rebuild
from ospq_export.onnx.write import write_onnx


@dataclass
class Passed:
    """What came of a network: its graph, its quantizers, and what each execution gives for the same images."""

    captured: fx.GraphModule
    network: QuantizedGraph
    images: Tensor
    module: Tensor
    graph: Tensor
    fake: Tensor
    float_file: Tensor
    quantized_file: Tensor


def run_file(path: Path, images: Tensor) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    # Unfused, so that its sums are those of the graph up to their order.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def rebuilt(captured: fx.GraphModule) -> fx.GraphModule:
    """The graph as a run directory gives it back."""
    again = rebuild(json.loads(json.dumps(describe(captured))), Path("graph.json"))
    again.load_state_dict(captured.state_dict(), assign=True)
    return again


def through(
    model: nn.Module, size: tuple[int, ...], folder: Path, *, images: Tensor | None = None, batch: int = 3
) -> Passed:
    """Take a network through all stages, at W8A8.

    The batch is another one than that of the capture and than that of the rebuilding, and is free in the files.
    """
    images = (
        torch.randn(batch, *size, generator=torch.Generator().manual_seed(1)) if images is None else images
    )
    captured = capture(model, size)
    with torch.no_grad():
        expected = model(images)
        graph = captured(images)
        assert torch.equal(rebuilt(captured)(images), graph), "the rebuilt graph computes something else"
        network = insert_quantizers(captured, integers(8, 8))
        observe(network, images, batch_size=len(images), seed=0)
        network.set_mode(Mode.QUANTIZE)
        fake = network.module(images)
        lowered = lower(network)
    outputs = []
    for module, name in ((captured, "float.onnx"), (lowered, "qdq.onnx")):
        write_onnx(module, folder / name, input_size=size, batch_size=None, metadata={})
        outputs.append(run_file(folder / name, images))
    return Passed(captured, network, images, expected, graph, fake, *outputs)


def check(passed: Passed) -> Passed:
    """Hold every execution to the one that it stands for."""
    size = float(passed.module.double().square().mean().sqrt())
    assert size > 0
    for mine, theirs in ((passed.graph, passed.module), (passed.float_file, passed.graph)):
        assert mine.shape == theirs.shape
        assert float((mine - theirs).abs().max()) <= 1e-4 * float(theirs.abs().max())
    noise = (passed.fake - passed.graph).double().square().mean()
    apart = (passed.quantized_file - passed.fake).double().square().mean()
    assert 0 < float(noise) < 0.25 * size**2, "8 bits are near, and not the same"
    # Both round at their edges: far less than quantization itself.
    assert float(apart) < 0.3 * float(noise)
    return passed
