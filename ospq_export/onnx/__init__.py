"""ONNX files: reading, naming, writing, passes over them, and lint."""
