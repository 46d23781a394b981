"""Trains a small timm transformer on Fashion-MNIST: the network behind the packaged demonstration.

Images: the four idx files of Debian's package `dataset-fashion-mnist` (MIT licence).
The file's metadata holds the timm name, its keyword arguments and the FP32 Top-1 on the 10,000 test images.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ospq_export.demo import MEAN, NETWORKS, STD
from pack_demo_images import SIDE, read_split

Images = tuple[Tensor, Tensor]
"""Normalised images (N, 1, 28, 28), float32, and their labels (N,), int64."""


def read(folder: Path, kind: Literal["train", "t10k"]) -> Images:
    """The images of one set as the network takes them."""
    images, labels = read_split(folder, kind)
    pixels = torch.from_numpy(images.copy()).float().unsqueeze(1) / 255
    return (pixels - MEAN) / STD, torch.from_numpy(labels.astype(np.int64))


def augment(images: Tensor) -> Tensor:
    """Random horizontal flip of each image, and a shift of the whole batch by up to 2 pixels."""
    images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(-1), images)
    dx, dy = torch.randint(0, 5, (2,)).tolist()
    return F.pad(images, (2, 2, 2, 2), mode="replicate")[..., dy : dy + SIDE, dx : dx + SIDE]


def top1(network: nn.Module, test: Images) -> float:
    """Share of the test images that the network classifies correctly."""
    network.eval()
    with torch.inference_mode():
        predicted = torch.cat([network(images).argmax(1) for images in test[0].split(500)])
    return (predicted == test[1]).float().mean().item()


def train_epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    train: Images,
    arguments: argparse.Namespace,
    progress: Callable[[], float],
) -> float:
    """One pass over the training set, or less where the time is up; returns the mean loss."""
    network.train()
    losses = []
    for indices in torch.randperm(len(train[0])).split(arguments.batch):
        if (done := progress()) >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = arguments.lr * min(done / 0.03, 0.5 * (1 + math.cos(math.pi * done)))
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16):
            logits = network(augment(train[0][indices]))
        loss = F.cross_entropy(logits.float(), train[1][indices], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / max(len(losses), 1)


def fit(network: nn.Module, train: Images, test: Images, arguments: argparse.Namespace) -> None:
    """Trains for the time given; the learning rate rises over its first 3 % and falls along a cosine to 0."""
    optimizer = torch.optim.AdamW(network.parameters(), arguments.lr, weight_decay=0.05)
    start, epoch = time.time(), 0

    def progress() -> float:
        return (time.time() - start) / (arguments.minutes * 60)

    while progress() < 1:
        loss = train_epoch(network, optimizer, train, arguments, progress)
        epoch += 1
        accuracy = top1(network, test)
        print(f"epoch {epoch} {progress():.2f} loss {loss:.4f} top1 {accuracy:.4f}", flush=True)


def save(network: nn.Module, name: str, accuracy: float, out: Path) -> None:
    """Writes the weights, with what they are in the file's metadata."""
    metadata = {
        "model": NETWORKS[name].name,
        "model_kwargs": json.dumps(NETWORKS[name].kwargs),
        "top1": f"{accuracy:.4f}",
        "mean": str(MEAN),
        "std": str(STD),
    }
    save_file(
        {key: value.contiguous() for key, value in network.state_dict().items()}, out, metadata=metadata
    )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=NETWORKS)
    parser.add_argument("data", type=Path, help="folder with the four idx files")
    parser.add_argument("out", type=Path, help="the .safetensors file to write")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--init", type=Path, help="weights to start from")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument(
        "--bf16", action="store_true", help="bfloat16 products: twice as fast on CPUs that have them"
    )
    return parser.parse_args()


def main() -> None:
    """Trains, measures and saves."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    spec = NETWORKS[arguments.model]
    network = timm.create_model(spec.name, pretrained=False, drop_path_rate=0.05, **spec.kwargs)
    if arguments.init:
        network.load_state_dict(load_file(arguments.init))
    print(arguments.model, sum(weight.numel() for weight in network.parameters()), "parameters", flush=True)
    train, test = read(arguments.data, "train"), read(arguments.data, "t10k")
    fit(network, train, test, arguments)
    accuracy = top1(network, test)
    save(network, arguments.model, accuracy, arguments.out)
    print("saved", arguments.out, accuracy)


if __name__ == "__main__":
    main()
