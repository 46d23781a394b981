"""timm families and the arguments that make one model of each small; the weights are random."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """One small network of a family.

    Attributes:
        name: timm's name of the model.
        side: of its square images, in pixels.
        kwargs: what makes it small.
    """

    name: str
    side: int = 64
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> dict[str, Any]:
        """All keyword arguments of `timm.create_model`."""
        return {"num_classes": 10, **self.kwargs}

    def enlarged(self) -> Family:
        """The same with images of twice the side, where that is below 128 pixels: enough tokens for an FP8 attention."""
        if self.side >= 128:
            return self
        sizes = {
            k: (2 * self.side, 2 * self.side) if isinstance(v, tuple) else 2 * self.side
            for k, v in self.kwargs.items()
            if k == "img_size"
        }
        return Family(self.name, 2 * self.side, {**self.kwargs, **sizes})


def _vit(name: str, side: int = 64, **kwargs: Any) -> Family:
    return Family(name, side, {"depth": 2, "img_size": side, **kwargs})


_WINDOWS = {"depths": (2, 2), "num_heads": (3, 6)}
FAMILIES: dict[str, Family] = {
    "ViT": _vit("vit_tiny_patch16_224"),
    "PE": _vit("vit_pe_core_tiny_patch16_384"),
    "DeiT": _vit("deit_tiny_patch16_224"),
    "DeiT, distilled": _vit("deit_tiny_distilled_patch16_224"),
    "DeiT-3": _vit("deit3_small_patch16_224"),
    "FlexiViT": _vit("flexivit_small"),
    "DINOv2": _vit("vit_small_patch14_dinov2", 56),
    "DINOv3": _vit("vit_small_patch16_dinov3"),
    "SigLIP": _vit("vit_base_patch16_siglip_224"),
    "CLIP": _vit("vit_base_patch32_clip_224"),
    "BEiT": _vit("beit_base_patch16_224"),
    "BEiT v2": _vit("beitv2_base_patch16_224"),
    "EVA-02": _vit("eva02_tiny_patch14_224", 56),
    "CaiT": _vit("cait_xxs24_224"),
    "XCiT": _vit("xcit_nano_12_p16_224"),
    "Swin": Family("swin_tiny_patch4_window7_224", 56, {**_WINDOWS, "img_size": 56}),
    "Swin v2": Family("swinv2_tiny_window8_256", 64, {**_WINDOWS, "img_size": 64}),
    "LeViT": Family("levit_128s", 224, {"depth": (1, 1, 1)}),
    "PVT v2": Family("pvt_v2_b0", 64, {"depths": (1, 1, 1, 1)}),
    "Twins": Family("twins_svt_small", 224, {"depths": (1, 1, 1, 2)}),
    "MaxViT": Family("maxvit_rmlp_pico_rw_256", 64, {"img_size": 64}),
    "CoAtNet": Family("coatnet_nano_rw_224", 64, {"img_size": 64}),
    "MobileViT": Family("mobilevit_xxs"),
    "MobileViT v2": Family("mobilevitv2_050"),
    "EfficientFormer": Family("efficientformer_l1", 224, {"depths": (1, 1, 1, 2)}),
    "EfficientViT": Family("efficientvit_b0", 64, {"depths": (1, 1, 1, 1)}),
    "FastViT": Family("fastvit_t8", 64, {"layers": (1, 1, 1, 1)}),
    "PoolFormer": Family("poolformer_s12"),
    "GC ViT": Family("gcvit_xxtiny", 64, {"img_size": 64}),
    "Hiera": Family("hiera_tiny_224", 224, {"stages": (1, 1, 2, 1)}),
    "ConViT": Family("convit_tiny", 64, {"depth": 2, "img_size": 64, "local_up_to_layer": 1}),
    "TNT": Family("tnt_s_patch16_224", 64, {"depth": 2, "img_size": 64}),
    "CrossViT": Family("crossvit_9_240", 240, {"depth": ((1, 1, 0), (1, 1, 0))}),
    "MLP-Mixer": Family("mixer_s32_224", 64, {"img_size": 64}),
    "MViT v2": Family("mvitv2_tiny", 64, {"img_size": (64, 64)}),
    "SAM": _vit("samvit_base_patch16", embed_dim=96, num_heads=3, global_attn_indexes=(1,), window_size=3),
    "ConvNeXt": Family("convnext_atto", 64, {"depths": (1, 1, 1, 1)}),
    "ConvNeXt v2": Family("convnextv2_atto", 64, {"depths": (1, 1, 1, 1)}),
}
