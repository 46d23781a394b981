"""TensorRT engines: products, building, and what their plans say."""
