"""TensorRT engines: products, building, and what their plans say.

Imports formats, onnx, runs and world; knows nothing of a stage.
"""
