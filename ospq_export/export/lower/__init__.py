"""Lowering of a quantized network to deployable operators: the graph, and a module for each family of formats."""
