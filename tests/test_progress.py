"""Progress where standard error is no terminal: plain lines, at intervals, and none at all where none are wanted."""

import os
import pty
import subprocess
import sys

import pytest

from ospq_export.progress import PlainProgress, announce, stage_progress, stepper


def walked(progress, steps, seconds, total=100):
    """Lines of a task whose steps take so long on a clock of its own."""
    clock = [0.0]
    progress.get_time = lambda: clock[0]
    advance = stepper(progress, "observe", total)
    for _ in range(steps):
        clock[0] += seconds
        advance()


@pytest.fixture
def plain():
    return stage_progress()


def test_a_line_per_tenth_with_percent_and_eta(plain, capsys):
    assert isinstance(plain, PlainProgress)
    walked(plain, 100, 1.0)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "observe: 10 % (10 of 100), 0:10 elapsed, ETA 1:30"
    assert lines[-1] == "observe: 100 % (100 of 100), 1:40 elapsed" and len(lines) == 10


def test_no_flood_and_no_silence(plain, capsys):
    walked(plain, 1000, 0.01, total=1000)
    assert len(capsys.readouterr().err.splitlines()) == 2, "ten seconds: at half, and at the end"
    walked(plain, 3, 3700.0, total=100)
    assert (
        capsys.readouterr().err.splitlines()[-1] == "observe: 3 % (3 of 100), 3:05:00 elapsed, ETA 99:41:40"
    )
    walked(plain, 5, 0.1, total=5)
    assert not capsys.readouterr().err, "what takes no second needs no line"


def test_without_an_end_there_is_no_percentage(plain, capsys):
    walked(plain, 2, 61.0, total=None)
    assert capsys.readouterr().err.splitlines()[-1] == "observe: 2 done, 2:02 elapsed"


def test_quiet_shows_nothing(capsys):
    progress = stage_progress(disable=True)
    with progress:
        walked(progress, 100, 10.0)
        announce(progress, "about 5 min")
    assert capsys.readouterr() == ("", "")


SCRIPT = """
from ospq_export.progress import announce, stage_progress, stepper
with stage_progress() as progress:
    clock = [0.0]
    progress.get_time = lambda: clock[0]
    step = stepper(progress, "observe", 2)
    announce(progress, "[w8a8] " + 120 * "x")
    clock[0] = 60.0
    step(), step()
"""


def test_a_pipe_gets_no_control_codes_and_a_terminal_gets_bars():
    environment = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == [
        "[w8a8] " + 120 * "x",
        "observe: 50 % (1 of 2), 1:00 elapsed, ETA 1:00",
        "observe: 100 % (2 of 2), 1:00 elapsed",
    ]
    controller, terminal = pty.openpty()
    subprocess.run(command, env=environment, stderr=terminal, check=True)
    os.close(terminal)
    assert "━" in os.read(controller, 1 << 16).decode()
    os.close(controller)
