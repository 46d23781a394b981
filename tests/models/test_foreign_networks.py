"""Networks of torchvision, transformers and timm beyond plain classifiers, tiny and with random weights."""

from collections import OrderedDict

import pytest
import timm
import torch
import torchvision
import transformers
from through import check, rebuilt, through
from torch import nn
from torchvision.models.segmentation import DeepLabV3
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

from ospq_export.calibrate.checks import float_products
from ospq_export.formats.choice import integers
from ospq_export.graph.capture import capture, quantizable_nodes
from ospq_export.graph.insertion import insert_quantizers

aten = torch.ops.aten
VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}


class Picked(nn.Module):
    """One of a network's outputs."""

    def __init__(self, network, pick):
        super().__init__()
        self.network, self.pick = network, pick

    def forward(self, x):
        output = self.network(x)
        return output[self.pick] if isinstance(self.pick, str | int) else self.pick(output)


class Dilated(nn.Module):
    """A backbone as torchvision's segmentation networks have it: its last layer dilated in place of a stride."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, 4, 1)
        self.last = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4), nn.BatchNorm2d(8), nn.ReLU()
        )

    def forward(self, x):
        return OrderedDict(out=self.last(self.first(x)))


def swin():
    return torchvision.models.SwinTransformer([4, 4], 8, [1, 2], [2, 2], [4, 4], num_classes=5)


def deeplab():
    return Picked(DeepLabV3(Dilated(), DeepLabHead(8, 4, atrous_rates=(2, 3, 4))), "out")


def vit(attention):
    config = transformers.ViTConfig(**VIT, num_labels=5, attn_implementation=attention)
    return Picked(transformers.ViTForImageClassification(config), "logits")


def dinov2():
    config = transformers.Dinov2Config(**{**VIT, "image_size": 56})  # its position embedding is resized
    return Picked(transformers.Dinov2Model(config), "last_hidden_state")


def segformer():
    config = transformers.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=8,
        num_labels=3,
    )
    return Picked(transformers.SegformerForSemanticSegmentation(config), "logits")


def detr():
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=4,
        num_labels=3,
        **HEADS,
    )
    return Picked(transformers.DetrForObjectDetection(config), "pred_boxes")


def features():
    return Picked(timm.create_model("resnet10t", features_only=True, out_indices=(2,)), 0)


def headless():
    small = {"img_size": 32, "depth": 1, "embed_dim": 16, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, **small)


# Network, image size, and whether it is exported here: others have the same operators.
NETWORKS = {
    "torchvision swin": (swin, 32, False),
    "torchvision deeplab": (deeplab, 32, True),
    "transformers vit, sdpa": (lambda: vit("sdpa"), 32, True),
    "transformers vit, eager": (lambda: vit("eager"), 32, False),
    "transformers dinov2": (dinov2, 32, False),
    "transformers segformer": (segformer, 32, False),
    "transformers detr": (detr, 32, False),
    "timm features": (features, 32, False),
    "timm headless": (headless, 32, False),
}


def made(name):
    torch.manual_seed(0)
    build, side, _ = NETWORKS[name]
    return build().eval(), (3, side, side)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_captured_rebuilt_and_given_quantizers(name):
    model, size = made(name)
    captured = capture(model, size)
    again = rebuilt(captured)
    for batch in (1, 3):
        images = torch.randn(batch, *size, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            mine, theirs = captured(images), model(images)
            assert torch.equal(again(images), mine)
        assert float((mine - theirs).abs().max()) <= 1e-4 * float(theirs.abs().max())
    assert float_products(captured) == []
    kinds = [node.target for node in quantizable_nodes(captured.graph)]
    assert len(insert_quantizers(captured, integers(8, 8)).weights) == sum(
        k is not aten.matmul.default for k in kinds
    )
    if "vit" in name:
        assert kinds.count(aten.matmul.default) == 2, "attention is two products, whatever computed it"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, (_, _, exported) in NETWORKS.items() if exported])
def test_exported_files_agree(name, tmp_path):
    model, size = made(name)
    check(through(model, size, tmp_path))
