"""`inspect`: a table, a file, and bad input refused in one line."""

import json

import numpy as np
import pytest
from PIL import Image
from test_cli import KWARGS, MODEL, assert_refused, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("inspected")
    (root / "a").mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (40, 36, 3), np.uint8)).save(root / "a" / f"{i}.png")
    return root


def test_table_json_and_plot(capsys, folder, tmp_path):
    fixed = ["inspect", MODEL, "--data", folder, "--model-kwargs", KWARGS, "--random-weights", "--workers", 0]
    status, stdout, _ = run(capsys, *fixed, "--quiet", "--out", tmp_path / "p.json")
    assert status == 0 and "kurtosis" in stdout
    records = json.loads((tmp_path / "p.json").read_text())
    assert {"blocks.0.mlp.fc1.input", "head.input"} <= {r["name"] for r in records}
    assert run(capsys, *fixed, "--quiet", "--out", tmp_path / "p.png")[0] == 0
    with Image.open(tmp_path / "p.png") as plot:
        assert plot.size[0] > 500
    assert_refused(run(capsys, *fixed, "--out", tmp_path / "p.pdf"), "JSON or PNG", tmp_path / "p.pdf")
    assert_refused(run(capsys, *fixed, "--device", "cuda:77"), "cannot be used", tmp_path / "none")
    assert_refused(run(capsys, *fixed, "--mean", "0.5,x"), "--mean", tmp_path / "none")


def test_preprocessing_is_the_users(capsys, folder, tmp_path):
    fixed = ["inspect", MODEL, "--data", folder, "--model-kwargs", KWARGS, "--random-weights", "--workers", 0]

    def profile(name, *options):
        assert run(capsys, *fixed, "--quiet", "--out", tmp_path / name, *options)[0] == 0
        return json.loads((tmp_path / name).read_text())

    plain, shifted = profile("a.json"), profile("b.json", "--mean", "0.9")
    assert plain == profile("c.json") and plain != shifted
