"""Reconstruction of slices: activations at cuts, the learning loop, roundings and scales."""
