"""Equalization before quantization: per site, the factors and shifts under which its quantized readers err least.

The candidates come from SmoothQuant (Xiao et al., ICML 2023, eq. 4: s = max|X|^a / max|W|^(1-a)), from AWQ (Lin et al., MLSys
2024: a power of the activation's magnitude) and from RepQ-ViT (Li et al., ICCV 2023: channel range over mean range, with the
middle of the range as a shift). Ours are the search, site by site, by output error, and the shift of v: the rows of a softmax
sum to one, so v may lose a constant that the projection's bias gets back, and what rounding does to these sums no longer counts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, fx

from ospq_export.calibrate import center
from ospq_export.calibrate.candidates import Change, Channels, Region
from ospq_export.calibrate.checkpoints import Pieces, parsed
from ospq_export.formats.choice import Choice
from ospq_export.graph.equalization import Site, find_sites, rescale
from ospq_export.graph.insertion import insert_quantizers
from ospq_export.graph.keys import find_keys
from ospq_export.graph.quantizers import QuantizedGraph
from ospq_export.runs.manifest import EqualizedSite

Method = Literal["center", "smooth", "shift", "repq"]
# A change must lower the error by this share, or the site stays as it is: what the sample cannot tell is left alone.
_MUST_GAIN = 0.02
_NONE = "none"


def equalize(
    captured: fx.GraphModule,
    images: Tensor,
    formats: Choice,
    method: Method,
    *,
    seed: int = 0,
    values_per_tensor: int = 1 << 15,
    settled: Callable[[EqualizedSite], None] = lambda _record: None,
    pieces: Pieces | None = None,
) -> list[EqualizedSite]:
    """Move outlier channels out of activations into weights, in place; the float function stays the same.

    One float forward pass over the images; at each site, as soon as its readers have run, the candidates are compared on the
    site's own stretch of the graph with its quantizers on.

    Args:
        captured: from `capture`; its constants change, its structure does not.
        images: float32 (N, C, H, W), normalised, on any device; a few dozen are enough.
        formats: of the quantizers that will be inserted.
        method: "center": keys only, see `center_keys`; "smooth": factors searched; "shift": factors and shifts;
            "repq": RepQ-ViT's form for every LayerNorm, unsearched.
        seed: of the choice of values that ranges are searched on.
        values_per_tensor: how many values of a tensor a range is searched on.
        settled: called after each site.
        pieces: where the sites that are settled are kept; those found there are taken over, and `settled` is not told.
            Keys, which take seconds, are centred again.

    Returns:
        One record per site, in graph order.

    Raises:
        InputError: a checkpoint is damaged, or cannot be written.
    """
    device = next(captured.buffers()).device
    if method == center.CHOICE:
        return center.center_keys(captured, images.to(device), formats, settled)
    sites = [s for s in find_sites(captured.graph) if method != "repq" or s.is_norm]
    network = insert_quantizers(captured, formats)
    search = _Search(network, sites, method, values_per_tensor, seed, settled, pieces)
    with torch.no_grad():
        search.run(images.to(device))
    return search.records


def count_sites(captured: fx.GraphModule, method: Method) -> int:
    """How many sites `equalize` settles, at most."""
    return len((find_keys if method == center.CHOICE else find_sites)(captured.graph))


class _Search(fx.Interpreter):
    """A float forward pass that stops at each site and settles it."""

    def __init__(
        self,
        network: QuantizedGraph,
        sites: list[Site],
        method: Method,
        wanted: int,
        seed: int,
        settled: Callable[[EqualizedSite], None],
        pieces: Pieces | None,
    ) -> None:
        super().__init__(network.module)
        self.method, self.wanted, self.settled, self.pieces = method, wanted, settled, pieces
        self.generator = torch.Generator().manual_seed(seed)
        self.records: list[EqualizedSite] = []
        self.ending: defaultdict[fx.Node, list[Region]] = defaultdict(list)
        self.waiting: defaultdict[fx.Node, list[Region]] = defaultdict(list)
        for region in (Region(network, site) for site in sites):
            self.ending[region.nodes[-1]].append(region)
            for node in region.inputs:
                self.waiting[node].append(region)

    def run_node(self, n: fx.Node) -> Any:
        """Run one operator; keep what a site needs, and settle a site whose last reader has run."""
        result = super().run_node(n)
        for region in self.waiting.get(n, ()):
            region.values[n] = result
        for region in self.ending.get(n, ()):
            self.records.append(self._restored(region) or self._settle(region))
            region.values.clear()
        return result

    def _restored(self, region: Region) -> EqualizedSite | None:
        """What an interrupted search found at this site, done once more; None where it did not come so far."""
        index = len(self.records)
        found = None if self.pieces is None else self.pieces.read(index)
        if self.pieces is None or found is None:
            return None
        tensors, header = found
        record = parsed(EqualizedSite, header.get("record", ""), self.pieces.path(index))
        if record.choice != _NONE:
            rescale(region.network.module, region.site, tensors["scale"], tensors["shift"])
        # The sites that follow draw the values that they would have drawn.
        self.generator.set_state(tensors["generator"])
        return record

    def _settle(self, region: Region) -> EqualizedSite:
        chosen, before, after = self._searched(region)
        if chosen.name != _NONE:
            rescale(region.network.module, region.site, chosen.scale, chosen.shift)
        record = EqualizedSite(
            producer=region.site.producer.meta["module_path"],
            consumers=[c.node.meta["module_path"] for c in region.site.consumers],
            choice=chosen.name,
            error_before=before,
            error_after=after,
            largest_factor=float(chosen.scale.max()),
        )
        if self.pieces is not None:
            kept = {"scale": chosen.scale, "shift": chosen.shift, "generator": self.generator.get_state()}
            self.pieces.write(len(self.records), kept, {"record": record.model_dump_json()})
        self.settled(record)
        return record

    def _searched(self, region: Region) -> tuple[Change, float, float]:
        """The change to make, and the errors before and after it."""
        region.prepare(self.wanted, self.generator)
        channels = Channels.of(region)
        chosen = channels.repq() if self.method == "repq" else channels.none()
        before = region.error(channels.none())
        after = region.error(chosen) if self.method == "repq" else before
        if self.method == "shift":
            chosen, after = _best(region, chosen, after, channels.shifts())
        if self.method != "repq":
            chosen, after = _best(region, chosen, after, channels.factors(chosen.shift))
        if self.method != "repq" and not after < (1.0 - _MUST_GAIN) * before:
            return channels.none(), before, before
        return chosen, before, after


def _best(region: Region, best: Change, error: float, candidates: list[Change]) -> tuple[Change, float]:
    for candidate in candidates:
        found = region.error(candidate)
        if found < error:
            best, error = candidate, found
    return best, error
