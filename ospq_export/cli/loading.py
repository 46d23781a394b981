"""A float network and some of its images, as commands that only look at it need them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor, fx, nn

    from ospq_export.data import DataConfig
    from ospq_export.data.config import ClassLevel
    from ospq_export.models.record import ModelSpec


class Loaded(NamedTuple):
    """The network, its preprocessing, its graph on the device, and images (N, C, H, W) float32."""

    network: nn.Module
    config: DataConfig
    captured: fx.GraphModule
    images: Tensor


def load(
    spec: ModelSpec,
    data: str,
    settings: dict[str, Any],
    count: int,
    *,
    device: str,
    seed: int,
    workers: int,
    class_from: ClassLevel | None = None,
) -> Loaded:
    """Make a network, and read some images for it.

    Args:
        spec: what to make.
        data: whatever `data.open_source` opens.
        settings: of the preprocessing; see `cli.options.data_settings`.
        count: how many images at most.
        device: torch device.
        seed: of random weights, and of which images.
        workers: processes that decode.
        class_from: folder or path.

    Raises:
        InputError: the device, the data or the network cannot be had.
    """
    import torch

    from ospq_export.data import ClassChoice, image_set, open_source, resolve_data_config
    from ospq_export.graph.capture import capture
    from ospq_export.models.sources import check_input, create_model
    from ospq_export.models.timm import for_size, torch_device

    target, choice = torch_device(device), ClassChoice(level=class_from)
    found = open_source(data, choice)
    spec = for_size(spec, settings.get("input_size"))
    torch.manual_seed(seed)
    network = create_model(spec)
    config = resolve_data_config(network, spec, settings)
    check_input(network, spec, config.input_size)
    images = image_set(found, config, choice, None, needed=False).sample(count, seed, workers).images
    return Loaded(network, config, capture(network, config.input_size).to(target), images)
