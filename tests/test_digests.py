"""Codes, scales, graphs and ONNX bytes are those of before formats, tasks and executions were objects: tests/digests.json."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
def test_a_run_and_its_files_are_the_same_to_the_last_bit():
    """One network and recipe with every kind of file; `python tests/digests.py` makes all four."""
    name = "swin w4a4"
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, str(HERE / "digests.py"), name]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)[name] == json.loads((HERE / "digests.json").read_text())[name]
