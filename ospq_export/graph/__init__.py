"""The one representation of a network that all stages share: captured ATen graph, cut points, quantizers, number semantics.

This package imports none of the stages.
"""
