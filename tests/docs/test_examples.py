"""What the guides tell a reader to run, run from their very text."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from documents import DOCS, blocks, run_line
from PIL import Image

from ospq_export import Run
from ospq_export.graph.capture import capture

OWN, CI = DOCS / "guides" / "own-model.md", DOCS / "guides" / "ci.md"
IMAGES = 160
STATUS = {0: "passed", 1: "refused", 2: "bad input", 3: "undecided"}


def save_files(page, folder):
    """The blocks of a page that have the name of a file."""
    for block in blocks(page):
        if block.title:
            (folder / block.title).write_text(block.text)


def run_python(page):
    """The blocks of Python that are no file, one after the other, as in one session."""
    names: dict[str, object] = {}
    found = [b for b in blocks(page) if b.language == "python" and not b.title]
    for block in found:
        exec(compile(block.text, str(page), "exec"), names)
    return len(found)


def shell_lines(page):
    return [line for b in blocks(page) if b.language == "bash" and not b.title for line in b.lines()]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with the folders calibration/ and validation/ of random images, and images/, as the guides name them."""
    folder = tmp_path_factory.mktemp("reader")
    random = torch.Generator().manual_seed(0)
    for name in ("calibration", "validation"):
        (folder / name).mkdir()
        for i in range(IMAGES):
            pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=random)
            Image.fromarray(pixels.numpy()).save(folder / name / f"{i}.png")
    (folder / "images").symlink_to(folder / "validation")
    return folder


@pytest.fixture(scope="module")
def own_network(images):
    """That folder after the commands of the guide on a network of one's own; the exit statuses of its lines."""
    save_files(OWN, images)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(images)
        return images, [run_line(line) for line in shell_lines(OWN)]


@pytest.mark.slow
def test_own_module_from_python(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_python(OWN) == 2
    assert "faithful" in capsys.readouterr().out
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()


@pytest.mark.slow
def test_own_module_on_the_command_line(own_network):
    folder, statuses = own_network
    assert statuses == [0, 0, 0]
    assert (folder / "runs" / "network" / "report.html").is_file()


@pytest.mark.slow
def test_two_files(own_network, monkeypatch):
    folder, _ = own_network
    monkeypatch.chdir(folder)
    shutil.copy("runs/network/model_fp32.onnx", "model.onnx")
    shutil.copy("runs/network/model.onnx", "model_int8.onnx")
    compared, linted = map(run_line, shell_lines(DOCS / "guides" / "two-files.md"))
    # So few images without labels may decide nothing.
    assert compared in (0, 3) and linted == 0
    assert Path("model_int8.report/report.html").is_file()


@pytest.fixture(scope="module")
def gated(own_network):
    """That folder with its run where the guide on CI expects it, and the files of that guide."""
    folder, _ = own_network
    save_files(CI, folder)
    shutil.copytree(folder / "runs" / "network", folder / "runs" / "model")
    # The installed command may be that of another checkout.
    command = folder / "bin" / "ospq-export"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m ospq_export.cli "$@"\n')
    command.chmod(0o755)
    return folder


def in_shell(folder, line, path, **variables):
    environment = {**os.environ, "PATH": f"{path}:{os.environ['PATH']}", **variables}
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_ci_gate(gated):
    (line,) = shell_lines(CI)
    done = in_shell(gated, line, gated / "bin", MAX_DROP="5")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "passed"), done.stdout + done.stderr


def test_ci_gate_passes_every_status_on(tmp_path):
    save_files(CI, tmp_path)
    (line,) = shell_lines(CI)
    for status, word in STATUS.items():
        command = tmp_path / "ospq-export"
        command.write_text(f"#!/bin/sh\nexit {status}\n")
        command.chmod(0o755)
        done = in_shell(tmp_path, line, tmp_path)
        assert done.returncode == status and word in done.stdout


@pytest.mark.slow
def test_ci_workflow(gated, monkeypatch):
    """So few images show no loss below one point: the workflow stops with exit status 3, and its report is kept all the same."""
    monkeypatch.chdir(gated)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(gated / "summary.md"))
    steps = yaml.safe_load(Path("github-workflow.yml").read_text())["jobs"]["gate"]["steps"]
    statuses = {
        step["name"]: run_line(step["run"]) for step in steps if "run" in step and step["name"] != "install"
    }
    assert statuses == {"lint": 0, "validate": 3, "summary": 0}
    assert "too few images" in Path("summary.md").read_text()


@pytest.mark.slow
def test_ci_from_python(gated, monkeypatch):
    monkeypatch.chdir(gated)
    names: dict[str, object] = {}
    exec(Path("test_model.py").read_text(), names)
    with pytest.raises(AssertionError, match="too few images"):
        names["test_the_deployed_model"]()
    assert Run.open("runs/model").path.is_dir()


def test_head_of_dinov2(tmp_path):
    save_files(DOCS / "guides" / "dinov2.md", tmp_path)
    names: dict[str, object] = {}
    exec((tmp_path / "my_dinov2.py").read_text(), names)
    model = names["make"](classes=3, pretrained=False, img_size=28, depth=1)
    graph = capture(model, (3, 28, 28))
    images = torch.randn(2, 3, 28, 28)
    (found,) = graph(images) if isinstance(graph(images), tuple) else (graph(images),)
    assert torch.allclose(found, model(images), atol=1e-4) and found.shape == (2, 3)
