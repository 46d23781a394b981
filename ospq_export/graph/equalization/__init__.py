"""Channels that can be rescaled and shifted without changing what the network computes."""
