"""Forward passes of a slice that stop at a node, and go on from there."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx


class Passes(fx.Interpreter):
    """Forward passes of a slice that share what lies before a node.

    Only the tensors that the rest still reads are kept, so that no more memory is taken than by one pass.
    """

    def __init__(self, piece: fx.GraphModule, inputs: Sequence[Tensor], images: int) -> None:
        super().__init__(piece)
        self._rest = list(piece.graph.nodes)
        self.args_iter = iter((inputs[0], images, *inputs[1:]))
        self.advance(next(n for n in self._rest if n.op != "placeholder"))

    def advance(self, until: fx.Node) -> None:
        """Compute for good what lies before a node of the rest."""
        while self._rest[0] is not until:
            self._compute(self._rest.pop(0))

    def finish(self) -> tuple[Tensor, ...]:
        """The slice's tensors at its end, as `run_slice` has them; what is computed for them is forgotten."""
        kept = dict(self.env)
        *inner, last = self._rest
        for node in inner:
            self._compute(node)
        result = self.run_node(last)
        self.env = kept
        return result if isinstance(result, tuple) else (result,)

    def _compute(self, node: fx.Node) -> None:
        self.env[node] = self.run_node(node)
        for dead in self.user_to_last_uses.get(node, ()):
            del self.env[dead]
