"""ONNX files: reading, naming, writing, passes over them, and lint.

Imports runs, world and errors; only `write`, which translates a graph, needs torch.
"""
