"""Equalization before quantization: outlier channels move out of activations into weights; `search` has its sources."""

from ospq_export.calibrate.equalize.search import count_sites, equalize

__all__ = ["count_sites", "equalize"]
