"""Calls in processes of their own, forked from one that has imported the package: each costs no start-up."""

import contextlib
import functools
import multiprocessing.forkserver
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["forked_from"])


@functools.cache
def _ensure_server() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]))
        multiprocessing.forkserver.ensure_running()


class Forked:
    """A call in a process of its own, with what it prints."""

    def __init__(
        self, folder: Path, function: Callable[..., object], *arguments: Any, **environment: str
    ) -> None:
        """Start it.

        Args:
            folder: where it keeps what it prints.
            function: of a module, not of another function.
            arguments: of the function.
            environment: variables to set.
        """
        number = len(list(folder.glob("*.stdout")))
        self.printed = [folder / f"{number}.stdout", folder / f"{number}.stderr"]
        for path in self.printed:
            path.touch()
        _ensure_server()
        self.process = _CONTEXT.Process(
            target=_call, args=(self.printed, environment, function, arguments), daemon=True
        )
        self.process.start()

    def kill(self) -> None:
        """End it without warning; it may have ended already."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid or 0, signal.SIGKILL)

    def kill_when(self, ready: Callable[[], bool]) -> bool:
        """Kill it as soon as something is so, and wait for its end; False where it ended before."""
        while self.process.is_alive():
            if ready():
                self.kill()
                break
            time.sleep(0.002)
        return self.ended() == -signal.SIGKILL

    def ended(self) -> int:
        """Its exit status, when it has one; minus the signal that killed it."""
        self.process.join(400)
        assert self.process.exitcode is not None, "it takes too long"
        return self.process.exitcode

    @property
    def output(self) -> str:
        return self.printed[0].read_text()

    @property
    def errors(self) -> str:
        return self.printed[1].read_text()


def command_line(*arguments: str) -> None:
    """`ospq-export` with these arguments."""
    from ospq_export.cli.app import main

    sys.argv = ["ospq-export", *arguments]
    main()


def _call(
    printed: list[Path],
    environment: dict[str, str],
    function: Callable[..., object],
    arguments: tuple[Any, ...],
) -> None:
    for path, stream in zip(printed, (1, 2), strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), stream)
    os.environ.update(environment)
    # torch replaces its thread pool at the first use after a fork; two threads at once find none and abort.
    torch.set_num_threads(1)
    function(*arguments)
