"""Looking at the values inside of a graph while it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

OnValue = Callable[["Tap", fx.Node, Any], Any]
"""Tap, node, value -> None, or the value that the rest of the graph sees in its place."""


class Tap(fx.Interpreter):
    """Runs a graph and hands over the values of chosen nodes as they are computed."""

    def __init__(self, module: fx.GraphModule, watched: Mapping[fx.Node, OnValue]) -> None:
        """Choose what to look at.

        Args:
            module: whose nodes are watched.
            watched: what is called with the value of each node.
        """
        super().__init__(module)
        self.watched = watched

    def run_node(self, n: fx.Node) -> Any:
        """Run one operator; a value that its watcher returns takes the place of its own."""
        result = super().run_node(n)
        watch = self.watched.get(n)
        given = None if watch is None else watch(self, n, result)
        return result if given is None else given
