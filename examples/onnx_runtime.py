"""Classify an image with an exported file: ONNX Runtime, numpy and Pillow, nothing else.

    python examples/onnx_runtime.py RUN/model.onnx image.jpg

Preprocessing and class names come from the file's own metadata.
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def preprocess(path: str, config: dict) -> np.ndarray:
    """An image file as the network's input, float32 (1, C, H, W): resize the short side, crop the centre, normalise."""
    channels, height, width = config["input_size"]
    image = Image.open(path)
    if config.get("exif"):
        image = ImageOps.exif_transpose(image)
    image = image.convert("L" if channels == 1 else "RGB")
    filters = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
    resample = Image.Resampling(filters[config["interpolation"]])
    if config["crop_mode"] == "squash":
        size = (int(width / config["crop_pct"]), int(height / config["crop_pct"]))
    elif config["crop_mode"] == "center":
        scale = min(height, width) / config["crop_pct"]
        short = min(image.size)
        size = tuple(int(int(scale) * side / short) for side in image.size)
    else:
        raise SystemExit(f"crop mode {config['crop_mode']!r} is not shown in this example")
    image = image.resize(size, resample)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), np.float32) / 255
    pixels = pixels.reshape(height, width, channels)
    normalised = (pixels - np.float32(config["mean"])) / np.float32(config["std"])
    return np.ascontiguousarray(normalised.transpose(2, 0, 1)[None], np.float32)


def main() -> None:
    """Print the five most probable classes."""
    model, image = sys.argv[1:]
    options = onnxruntime.SessionOptions()
    # On x86 without VNNI the fast 8-bit kernels saturate; elsewhere this changes nothing.
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    inputs = preprocess(image, json.loads(metadata["preprocessing"]))
    # A file with a fixed batch wants exactly that many images.
    batch = session.get_inputs()[0].shape[0]
    if isinstance(batch, int):
        inputs = np.repeat(inputs, batch, axis=0)
    logits = session.run(None, {"images": inputs})[0][0]
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    classes = json.loads(metadata.get("classes", "[]"))
    for index in probabilities.argsort()[::-1][:5]:
        print(f"{probabilities[index]:7.2%}  {classes[index] if classes else index}")


if __name__ == "__main__":
    main()
