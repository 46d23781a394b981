"""What a validation saves is what it compared, and Polygraphy goes on from there as the guide says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers import tiny
from onnx import numpy_helper

from ospq_export import Run
from ospq_export.errors import InputError
from ospq_export.export import export
from ospq_export.validate.saved import SavedOutputs, inputs_beside

GUIDE = Path(__file__).parents[2] / "docs" / "polygraphy.md"


def test_a_rest_that_does_not_fill_a_batch_is_left_out(tmp_path):
    from polygraphy.comparator import RunResults
    from polygraphy.json import load_json

    saved = SavedOutputs(tmp_path / "outputs.json", 4)
    images = np.arange(11, dtype=np.float32).reshape(11, 1, 1, 1)
    for part in (images[:3], images[3:6], images[6:]):
        saved.add(part, {"deployed": {"y": 2 * part[:, 0, 0]}, "fake_quant": {"y": part[:, 0, 0]}})
    saved.write()
    results = RunResults.load(str(tmp_path / "outputs.json"))
    assert list(results.keys()) == ["fake_quant", "deployed"]
    feeds = load_json(str(inputs_beside(tmp_path / "outputs.json")))
    assert [feed["images"].ravel().tolist() for feed in feeds] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [list(step["y"].ravel()) for step in results["deployed"]] == [[0, 2, 4, 6], [8, 10, 12, 14]]


def test_a_file_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    with pytest.raises(
        InputError, match=r"there is no folder .*`save_outputs`|`save_outputs`.*there is no folder"
    ):
        SavedOutputs(tmp_path / "missing" / "outputs.json", 1)


def plant(run, suspect):
    """Three times one weight's scale; the tensor that it is the first to spoil."""
    model = onnx.load(str(run / "model.onnx"))
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    node = next(
        n for n in model.graph.node if n.name.startswith("blocks.1.mlp.fc1/") and n.input[0] in constants
    )
    scale = constants[node.input[1]]
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(3), scale.name))
    onnx.save(model, str(suspect))
    return node.output[0]


@pytest.mark.slow
def test_the_guide_finds_a_planted_fault(tmp_path):
    run = tmp_path / "RUN"
    tiny(run, recipe="w8a8")
    export(run)
    images = torch.randn(12, 1, 32, 32, generator=torch.Generator().manual_seed(5))
    # What the command line makes of files of images is tested elsewhere: here the tensors themselves.
    Run.open(run).validate(list(images), save_outputs=tmp_path / "outputs.json", documents=False)
    wrong = plant(run, tmp_path / "suspect.onnx")
    blocks = re.findall(r"```bash\n(.*?)```", GUIDE.read_text(), re.S)
    assert len(blocks) == 5 and "--save-outputs outputs.json" in blocks[0]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = [
        subprocess.run(["bash", "-ec", text], cwd=tmp_path, env=environment, capture_output=True, text=True)
        for text in blocks[1:]
    ]
    assert [step.returncode for step in done] == [0, 1, 0, 0], [step.stdout[-2000:] for step in done]
    assert "fake_quant" in done[0].stdout
    reduced = onnx.load(str(tmp_path / "reduced.onnx"))
    assert wrong in {*(value.name for value in reduced.graph.output), *reduced.graph.node[-1].input}
    assert reduced.graph.node[-1].name in done[-1].stdout
