"""The worked example of CONTRIBUTING.md: a format that is two modules, from the range search to ONNX Runtime."""

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from ospq_export import formats
from ospq_export.calibrate.observe import observe
from ospq_export.calibrate.reconstruct.reconstructor import Reconstructor, walk
from ospq_export.errors import InputError
from ospq_export.export import lower
from ospq_export.export.lower.graph import highest_opset
from ospq_export.export.lower.graph import lower as lowered
from ospq_export.formats.choice import Choice, _modules, named
from ospq_export.graph.granularity import slicing_of
from ospq_export.graph.insertion import insert_quantizers
from ospq_export.graph.quantizers import Mode
from ospq_export.onnx.write import write_onnx
from ospq_export.recipes import load_recipe

NAME = "int4_block32"
BLOCK = re.compile(r"`(?:formats|export/lower)/int4_block32\.py`:\n\n```python\n(.*?)\n```", re.DOTALL)


@pytest.fixture
def example(tmp_path, monkeypatch):
    """Its two modules, as if they lay in the package."""
    texts = BLOCK.findall((Path(__file__).parents[2] / "CONTRIBUTING.md").read_text())
    for package, text in zip((formats, lower), texts, strict=True):
        folder = tmp_path / package.__name__.rsplit(".", 1)[-1]
        folder.mkdir()
        (folder / f"{NAME}.py").write_text(text)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    _modules.cache_clear()
    yield
    for package in (formats, lower):
        sys.modules.pop(f"{package.__name__}.{NAME}", None)
        if hasattr(package, NAME):
            delattr(package, NAME)
    _modules.cache_clear()
    shutil.rmtree(tmp_path)


def blocks(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Nearest codes in [-8, 7], by loops: the last block may be short."""
    codes = np.empty_like(weight)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            codes[row, column] = np.clip(np.rint(weight[row, column] / scale[row, column // 32]), -8, 7)
    return codes


@pytest.mark.usefixtures("example")
def test_from_search_to_onnx_runtime(small_vit, noise, tmp_path):
    network = insert_quantizers(small_vit, Choice(NAME, "int8", "int8", "int8"))
    observe(network, noise, batch_size=16, seed=0)
    inner = [w for w in network.weights.values() if w.format.name == NAME]
    assert len(inner) == len(network.weights) - 2, "all but both ends"
    for quantizer in inner:
        weight = network.module.get_buffer(quantizer.constant).numpy()
        assert quantizer.scale.shape == (len(weight), -(-weight.shape[1] // 32))
        np.testing.assert_array_equal(quantizer.codes.numpy(), blocks(weight, quantizer.scale.numpy()))

    settings = load_recipe("w4a8", ["reconstruction.iterations=4", "reconstruction.refinement_images=0"])
    reconstructor = Reconstructor(settings.reconstruction, torch.device("cpu"))
    for step in walk(network, slicing_of(small_vit.graph, "block"), noise, reconstructor, seed=0):
        assert np.isfinite(step.metrics.error_after)

    network.set_mode(Mode.QUANTIZE)
    path = tmp_path / "model.onnx"
    opset = highest_opset(network)
    write_onnx(lowered(network), path, input_size=(3, 32, 32), batch_size=None, metadata={}, opset=opset)
    model = onnx.load(str(path))
    held = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    in_blocks = [
        n for n in model.graph.node if any(a.name == "block_size" and a.i == 32 for a in n.attribute)
    ]
    assert opset == 21 and len(in_blocks) == len(inner)
    for quantizer in inner:
        np.testing.assert_array_equal(held[f"{quantizer.name}.codes"], quantizer.codes.numpy().T)
    with torch.no_grad():
        expected = network.module(noise).numpy()
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": noise.numpy()})[0]
    assert np.abs(found - expected).mean() < 0.02 * expected.std()


@pytest.mark.usefixtures("example")
def test_the_recipe_chooses_it_and_a_record_brings_it_back():
    weight = named(load_recipe("w4a8", [f"weights={NAME}"]).formats().weight, weight=True)
    record = weight.record()
    assert record["format"] == NAME and weight.read(record) == weight
    with pytest.raises(InputError, match=f"no format '{NAME}' for activations"):
        named(NAME, weight=False)
    for weight, offered in ((True, True), (False, False)):
        with pytest.raises(InputError, match="there is no format 'int9'") as refused:
            named("int9", weight=weight)
        assert (NAME in str(refused.value)) is offered, "where it can be used, and nowhere else"


def test_it_is_gone_without_its_modules():
    with pytest.raises(InputError, match=f"no format '{NAME}'"):
        load_recipe("w4a8", [f"weights={NAME}"]).formats()
