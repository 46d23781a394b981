"""Networks of every source: built, with the preprocessing that they state, or refused in one line."""

import json
import math
import sys

import numpy as np
import pytest
import timm
import torch
import torchvision
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from ospq_export import cli
from ospq_export.data import resolve_data_config
from ospq_export.errors import InputError
from ospq_export.models.preprocessing import crop_share
from ospq_export.models.record import ModelSpec
from ospq_export.models.sources import check_input, create_model, network_bytes, preprocessing_of, split_name
from ospq_export.models.timm import for_size

SMALL_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
PROCESSOR = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory):
    """What save_pretrained writes, and the network itself."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vit")
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL_VIT, num_labels=4)).eval()
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder, model


def refused(match, function):
    with pytest.raises(InputError, match=match) as info:
        function()
    assert "\n" not in str(info.value)


def test_names_say_their_source():
    assert split_name("resnet18") == ("timm", "resnet18")
    assert split_name("hf-hub:org/name") == ("timm", "hf-hub:org/name")
    assert split_name("torchvision:resnet18") == ("torchvision", "resnet18")
    assert split_name("module:my.code:make") == ("module", "my.code:make")


def test_the_source_is_written_where_it_is_not_timm():
    assert "source" not in ModelSpec(name="resnet18").model_dump(mode="json")
    spec = ModelSpec(name="resnet18", source="torchvision")
    assert ModelSpec.model_validate(json.loads(spec.model_dump_json())) == spec


def test_torchvision(tmp_path):
    spec = ModelSpec(name="squeezenet1_1", source="torchvision", kwargs={"num_classes": 4})
    torch.manual_seed(0)
    model = create_model(spec)
    assert network_bytes(spec) == sum(4 * p.numel() for p in model.parameters())
    assert check_input(model, spec, (3, 64, 96)) == 4
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    again = create_model(spec.model_copy(update={"checkpoint": str(tmp_path / "w.safetensors")}))
    assert torch.equal(again(torch.ones(1, 3, 64, 64)), model(torch.ones(1, 3, 64, 64)))


@pytest.mark.parametrize("name", ["resnet50", "swin_v2_t", "convnext_tiny", "efficientnet_b3"])
def test_torchvisions_preprocessing_is_that_of_its_weights(name):
    spec = ModelSpec(name=name, source="torchvision")
    config = resolve_data_config(nn.Identity(), spec, {})
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (480, 480, 3), np.uint8))
    theirs = torchvision.models.get_model_weights(name).DEFAULT.transforms()(image)
    mine = config.transform()(image)
    assert mine.shape == theirs.shape and config.assumed == ()
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_torchvisions_refusals():
    refused("did you mean resnet", lambda: create_model(ModelSpec(name="resnet99", source="torchvision")))
    wrong = ModelSpec(name="resnet18", source="torchvision", kwargs={"nonsense": 1})
    refused("nonsense", lambda: create_model(wrong))
    boxes = ModelSpec(name="ssdlite320_mobilenet_v3_large", source="torchvision")
    refused("list of images", lambda: create_model(boxes))
    old = ModelSpec(name="resnet18", source="torchvision", kwargs={"weights": "OLD"})
    refused("choose from IMAGENET1K_V1", lambda: preprocessing_of(nn.Identity(), old))


def test_transformers_folder(vit_folder):
    folder, model = vit_folder
    spec = ModelSpec(name=str(folder), source="transformers", pretrained=True)
    mine, images = create_model(spec), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(mine(images).logits, model(images).logits)
    config = resolve_data_config(mine, spec, {})
    assert config.input_size == (3, 32, 32) and config.crop_mode == "squash" and config.crop_pct == 1
    assert config.mean == (0.5, 0.5, 0.5) and config.assumed == ()
    assert check_input(mine, spec, config.input_size) == 4
    assert network_bytes(spec) == sum(4 * p.numel() for p in model.parameters())
    other = create_model(spec.model_copy(update={"pretrained": False, "kwargs": {"num_labels": 7}}))
    assert check_input(other, spec, config.input_size) == 7


def test_transformers_missing_weights_are_named(tmp_path, caplog):
    torch.manual_seed(0)
    backbone = transformers.ViTModel(transformers.ViTConfig(**SMALL_VIT), add_pooling_layer=False)
    backbone.save_pretrained(tmp_path)
    create_model(ModelSpec(name=str(tmp_path), source="transformers", pretrained=True))
    assert "pooler" in caplog.text and "random" in caplog.text


def test_transformers_runs_no_code_of_the_folder(vit_folder, tmp_path, caplog):
    folder, _ = vit_folder
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForImageClassification": "modeling_mine.Mine"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "modeling_mine.py").write_text("raise SystemExit('it ran')")
    create_model(ModelSpec(name=str(tmp_path), source="transformers"))
    assert "is not run" in caplog.text
    config |= {"architectures": ["Mine"], "model_type": "mine"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(
        "cannot be read|has no Mine",
        lambda: create_model(ModelSpec(name=str(tmp_path), source="transformers")),
    )


def test_transformers_refusals(vit_folder, tmp_path):
    folder, _ = vit_folder

    def made(**fields):
        return lambda: create_model(ModelSpec(**{"name": str(folder), "source": "transformers", **fields}))

    refused("no config.json", made(name=str(tmp_path)))
    refused("nonsense", made(kwargs={"nonsense": 1}))
    refused("another shape: classifier", made(kwargs={"num_labels": 7}, pretrained=True))
    transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(
        tmp_path
    )
    refused("takes input_ids, not images", made(name=str(tmp_path)))


CASES = [
    ({"size": {"height": 64, "width": 48}, "do_center_crop": False}, ((3, 64, 48), 1.0, "squash")),
    (
        {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}, "do_center_crop": True},
        ((3, 56, 56), 0.875, "center"),
    ),
    ({"size": {"shortest_edge": 64, "longest_edge": 99}}, None),
]


@pytest.mark.parametrize(("stated", "expected"), CASES)
def test_preprocessor_config(stated, expected, tmp_path, caplog):
    kind = "CLIPImageProcessor" if "crop_size" in stated else "DetrImageProcessor"
    kind = "ViTImageProcessor" if "height" in stated["size"] else kind
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": kind, "image_mean": [0.1, 0.2, 0.3], "resample": 3, **stated})
    )
    spec = ModelSpec(name=str(tmp_path), source="transformers")
    if expected is None:
        refused("`input_size`", lambda: resolve_data_config(nn.Identity(), spec, {}))
        config = resolve_data_config(nn.Identity(), spec, {"input_size": (3, 64, 64)})
        assert config.assumed == ("crop_pct", "crop_mode") and "assumed: crop_pct" in caplog.text
    else:
        config = resolve_data_config(nn.Identity(), spec, {})
        assert (config.input_size, config.crop_pct, config.crop_mode) == expected
    assert config.mean == (0.1, 0.2, 0.3) and config.interpolation == "bicubic"


def test_channels_in_another_order_are_refused(tmp_path):
    stated = {"image_processor_type": "MobileViTImageProcessor", "do_flip_channel_order": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated))
    spec = ModelSpec(name=str(tmp_path), source="transformers")
    refused("BGR", lambda: resolve_data_config(nn.Identity(), spec, {}))


FACTORIES = """
import torch
from torch import nn

class Two(nn.Module):
    def forward(self, a, b):
        return a + b

class Nothing(nn.Module):
    def forward(self):
        return 1

def make(classes=4):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(classes)) if classes < 0 else nn.Sequential(
        nn.Conv2d(3, 4, 8, 8), nn.Dropout(), nn.Flatten(), nn.Linear(64, classes)
    )

def fails():
    raise RuntimeError("no luck\\nat all")

def number():
    return 3

def two():
    return Two()

def nothing():
    return Nothing()
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "my_networks.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("my_networks", None)


def of(name, **kwargs):
    return ModelSpec(name=f"my_networks:{name}", source="module", kwargs=kwargs)


@pytest.mark.usefixtures("factories")
def test_a_users_function(caplog):
    model = create_model(of("make", classes=5))
    assert not model.training and check_input(model, of("make"), (3, 32, 32)) == 5
    assert "runs your own code" in caplog.text and "training mode" in caplog.text
    config = resolve_data_config(model, of("make"), {"input_size": (3, 32, 32)})
    assert config.assumed == ("mean", "std", "interpolation", "crop_pct", "crop_mode")
    assert "assumed: mean" in caplog.text
    assert json.loads(config.model_dump_json())["assumed"] == list(config.assumed)


@pytest.mark.usefixtures("factories")
def test_functions_that_give_no_network_of_images():
    refused("raises RuntimeError: no luck", lambda: create_model(of("fails")))
    refused("returns int", lambda: create_model(of("number")))
    refused("cannot be imported", lambda: create_model(of("none")))
    refused("names no function", lambda: create_model(ModelSpec(name="my_networks", source="module")))
    refused("raises TypeError", lambda: create_model(of("make", depth=3)))
    for name, message in {"two": r"several inputs \(a, b\)", "nothing": "takes no input"}.items():
        refused(message, lambda name=name: check_input(create_model(of(name)), of(name), (3, 8, 8)))
    refused("`input_size`", lambda: resolve_data_config(nn.Identity(), of("make"), {}))
    refused("images of 3,16,16", lambda: check_input(create_model(of("make")), of("make"), (3, 16, 16)))


TIMM_VIT = {"depth": 1, "embed_dim": 32, "num_heads": 2}


@pytest.mark.parametrize("size", [(3, 64, 64), (3, 64, 96)])
def test_input_size_sets_timms_img_size(size, caplog):
    spec = for_size(ModelSpec(name="vit_tiny_patch16_224", kwargs=TIMM_VIT), size)
    assert spec.kwargs["img_size"] == (64 if size[1] == size[2] else (64, 96)) and "img_size" in caplog.text
    config = resolve_data_config(model := create_model(spec), spec, {"input_size": size})
    assert config.input_size == size and check_input(model, spec, size) == 1000


def test_input_size_leaves_others_alone():
    for spec, size in (
        (ModelSpec(name="vit_tiny_patch16_224", kwargs=TIMM_VIT), (3, 224, 224)),
        (ModelSpec(name="vit_tiny_patch16_224", kwargs={**TIMM_VIT, "img_size": 32}), (3, 64, 64)),
        (ModelSpec(name="resnet10t"), (3, 64, 96)),
        (ModelSpec(name="resnet18", source="torchvision"), (3, 64, 96)),
        (ModelSpec(name="vit_tiny_patch16_224"), None),
    ):
        assert for_size(spec, size) == spec


def test_timms_local_dir(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=4, img_size=32, **TIMM_VIT).eval()
    pretrained = {
        "input_size": [3, 32, 32],
        "num_classes": 4,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    described = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 4,
        "model_args": {**TIMM_VIT, "img_size": 32},
        "pretrained_cfg": pretrained,
    }
    (tmp_path / "config.json").write_text(json.dumps(described))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    spec = ModelSpec(name=f"local-dir:{tmp_path}", pretrained=True)
    mine, images = create_model(spec), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(mine(images), model(images), rtol=1e-4, atol=1e-5)
    assert resolve_data_config(mine, spec, {}).input_size == (3, 32, 32)
    missing = ModelSpec(name=f"local-dir:{tmp_path / 'none'}")
    refused("no config.json", lambda: create_model(missing))


@pytest.mark.parametrize(
    ("crop", "resize"), [(224, 232), (224, 256), (224, 236), (300, 320), (518, 518), (7, 9)]
)
def test_crop_share_gives_the_resized_side_back(crop, resize):
    assert math.floor(crop / crop_share(crop, resize)) == resize


def command_line(*words):
    with pytest.raises(SystemExit) as info, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ospq-export", *map(str, words)])
        cli.main()
    return info.value.code or 0


@pytest.mark.usefixtures("factories")
def test_on_the_command_line(tmp_path, capsys):
    for i in range(8):
        (tmp_path / "images" / "abcd"[i % 4]).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 255, (40, 36, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / "abcd"[i % 4] / f"{i}.png")
    words = [
        "calibrate",
        "module:my_networks:make",
        "--data",
        "images",
        "--out",
        "run",
        "--workers",
        "0",
        "-q",
    ]
    settings = ("calibration_images=8", "observation_images=8", "reconstruction.iterations=0")
    words += [word for setting in settings for word in ("--set", setting)]
    assert command_line(*words) == 2
    assert "--input-size" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert command_line(*words, "--input-size", "3,32,32") == 0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["model"]["source"] == "module" and "mean" in manifest["data"]["assumed"]
    (tmp_path / "my_networks.py").unlink()
    assert command_line("export", "run") == 0 and (tmp_path / "run" / "model.onnx").is_file()
