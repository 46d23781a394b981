"""The part that speaks with Ray: start it or join it, hand it tasks, take what they return."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ospq_export.calibrate.reconstruct.store import parse_bytes
from ospq_export.errors import InputError, reason_of
from ospq_export.sweep.plan import Resources
from ospq_export.world.room import gigabytes
from ospq_export.world.threads import allowed_cores

log = logging.getLogger(__name__)
# Tasks take and return a page of text: Ray's default would be a third of the memory.
_OBJECT_STORE = 100 * 2**20


def load_ray() -> Any:
    """The package.

    Raises:
        InputError: it is not installed.
    """
    # Read when the package is imported and when it starts its processes.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ImportError as error:
        raise InputError("sweeps need the package ray", fix="pip install 'ospq-export[sweep]'") from error
    return ray


@contextmanager
def cluster(address: str | None, resources: Resources) -> Iterator[Cluster]:
    """A Ray of this machine's own, or the one at an address.

    Raises:
        InputError: nothing answers there, or no node has what one run asks for.
    """
    ray = load_ray()
    options: dict[str, Any] = {
        "address": address or "local",
        "log_to_driver": False,
        "logging_level": "error",
    }
    if address is None:
        options |= {"include_dashboard": False, "object_store_memory": _OBJECT_STORE}
        options |= {"num_cpus": allowed_cores()}
    try:
        ray.init(**options)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        where = f"`address` {address}" if address else "a local Ray"
        raise InputError(f"Ray does not start: {reason_of(error)}", where=where) from error
    try:
        found = Cluster(ray, resources)
        found.check(local=address is None)
        yield found
    finally:
        ray.shutdown()


class Cluster:
    """Runs functions with what one run asks for."""

    def __init__(self, ray: Any, resources: Resources) -> None:
        self._ray, self._retries = ray, resources.retries
        self._asked: dict[str, float] = {"CPU": resources.cpus}
        if resources.gpus:
            self._asked["GPU"] = resources.gpus
        if resources.memory is not None:
            self._asked["memory"] = parse_bytes(resources.memory)

    def check(self, *, local: bool) -> None:
        """Hold what one run asks for to the nodes.

        Raises:
            InputError: no node has it, and this machine is the only one; other clusters may grow, and are warned of.
        """
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if any(all(node.get(k, 0) >= amount for k, amount in self._asked.items()) for node in nodes):
            return
        most = {kind: max((node.get(kind, 0) for node in nodes), default=0) for kind in self._asked}
        asked, there = (", ".join(_shown(*pair) for pair in side.items()) for side in (self._asked, most))
        if local:
            what = f"one run asks for {asked}, this machine has {there}"
            raise InputError(what, where="resources", fix="ask for less, or give `address`")
        log.warning("one run asks for %s, and no node has that (%s at most): runs wait for one", asked, there)

    def each(
        self, function: Callable[..., str], calls: Mapping[str, tuple[Any, ...]]
    ) -> Iterator[tuple[str, str, str]]:
        """Call a function once for each name, as many at a time as there is room for; what a dead worker did is done again.

        Returns:
            Triples (name, what the function returned, "") as they finish; (name, "", reason) where it returned nothing.
        """
        asked = dict(self._asked)
        options = {
            "num_cpus": asked.pop("CPU"),
            "num_gpus": asked.pop("GPU", 0),
            "memory": asked.pop("memory", None),
            "max_retries": self._retries,
        }
        task = self._ray.remote(function)
        running = {task.options(name=name, **options).remote(*given): name for name, given in calls.items()}
        while running:
            ready, _ = self._ray.wait(list(running))
            for reference in ready:
                name = running.pop(reference)
                yield name, *self._taken(reference)

    def _taken(self, reference: Any) -> tuple[str, str]:
        """What a task returned, or why it did not."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference), ""
        except errors.RayTaskError as error:
            return "", f"its worker could not begin: {reason_of(getattr(error, 'cause', None) or error)}"
        except errors.RayError as error:
            return "", f"its worker died {self._retries + 1} times: {reason_of(error)}"


def _shown(kind: str, amount: float) -> str:
    if kind == "memory":
        return f"{gigabytes(amount)} of memory"
    return f"{amount:g} {'processors' if kind == 'CPU' else 'GPUs'}"
