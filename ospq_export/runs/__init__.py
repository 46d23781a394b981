"""The run directory: names and hashes of its files, its manifest, its tensors, and a finished run as an object.

Imports data, formats, graph, models and recipes; knows nothing of ONNX or of a stage.
"""
