"""Faults that users of other deployment tools reported, as kinds: notes/reports.md has the table."""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path

import helpers as q
import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import CliRunner

from ospq_export.calibrate import calibrate
from ospq_export.calibrate.checks import check_graph, check_images, check_module, float_products
from ospq_export.calibrate.observe import observe
from ospq_export.cli.app import app
from ospq_export.cli.options import say
from ospq_export.data import Batch, DataConfig
from ospq_export.errors import InputError
from ospq_export.formats.choice import integers
from ospq_export.formats.search import Grid, compress, search_activation_range, search_weight_scale
from ospq_export.graph.capture import capture, quantizable_nodes
from ospq_export.graph.insertion import insert_quantizers
from ospq_export.graph.outputs import output_shapes
from ospq_export.graph.quantizers import Mode
from ospq_export.models.record import ModelSpec
from ospq_export.models.timm import create_model
from ospq_export.onnx.half import fits_fp16, to_half
from ospq_export.onnx.write import write_onnx
from ospq_export.recipes import load_recipe
from ospq_export.runs.files import json_line, json_text
from ospq_export.tasks.choice import choose_task
from ospq_export.validate.executions.half import HalfNetwork

SIZE = (3, 16, 16)
IMAGES = torch.randn(7, *SIZE, generator=torch.Generator().manual_seed(1))
TINY_VIT = {"img_size": 16, "patch_size": 8, "depth": 1, "num_classes": 4, "embed_dim": 24, "num_heads": 2}


class Around(nn.Module):
    """A convolution, anything, a classifier."""

    def __init__(self, middle: Callable[..., Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.middle, self.parts = middle, nn.ModuleList(parts)
        self.stem, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.middle(self.stem(images), *self.parts)
        logits: Tensor = self.head(x.mean((2, 3)) if x.dim() == 4 else x)
        return logits


def around(middle: Callable[..., Tensor], *parts: nn.Module) -> Around:
    torch.manual_seed(0)
    return Around(middle, *parts).eval()


def trained_norm(channels: int, **kwargs: object) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, **kwargs)  # type: ignore[arg-type]
    with torch.no_grad():
        for values in (norm.running_mean, norm.weight, norm.bias):
            if values is not None:
                values.normal_()
        norm.running_var.uniform_(0.1, 3.0)  # type: ignore[union-attr]
    return norm.eval()


def run_onnx(path: Path, images: Tensor) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options)
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def config(size: int = 16) -> DataConfig:
    return DataConfig(
        input_size=(3, size, size),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        interpolation="bicubic",
        crop_pct=1.0,
        crop_mode="center",
    )


# One weight, two places


@pytest.mark.parametrize("times", [2, 3])
def test_a_shared_convolution_is_folded_into_each_of_its_batch_norms(times: int) -> None:
    shared = nn.Conv2d(8, 8, 3, padding=1)
    norms = [trained_norm(8) for _ in range(times)]

    def middle(x: Tensor, conv: nn.Module, *after: nn.Module) -> Tensor:
        for norm in after:
            x = F.relu(norm(conv(x)))
        return x

    model = around(middle, shared, *norms)
    graph = capture(model, SIZE)
    with torch.no_grad():
        torch.testing.assert_close(graph(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)
    assert "batch_norm" not in str(graph.graph)


def test_a_convolution_read_with_and_without_a_batch_norm_keeps_both_functions() -> None:
    def middle(x: Tensor, conv: nn.Module, norm: nn.Module) -> Tensor:
        return norm(conv(x)) + conv(x.flip(3))  # type: ignore[no-any-return]

    model = around(middle, nn.Conv2d(8, 8, 3, padding=1), trained_norm(8))
    with torch.no_grad():
        torch.testing.assert_close(capture(model, SIZE)(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)


# A module that is no function of one image


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (around(lambda x: F.dropout(x, 0.5)), "a second time"),
        (around(lambda x: x + torch.rand(1, 8, 1, 1)), "a second time"),
        (around(lambda x: x + torch.randn_like(x)), "a second time"),
        (around(lambda x: x - x.mean(0, keepdim=True)), "other images of its batch"),
        (around(lambda x, norm: norm(x), nn.BatchNorm2d(8, track_running_stats=False)), "other images"),
        (around(lambda x: x.mean((2, 3)).softmax(0)), "other images"),
    ],
    ids=["dropout", "rand", "randn_like", "batch mean", "batch norm", "softmax over images"],
)
def test_random_and_batch_dependent_networks_are_refused(model: nn.Module, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_graph(model, capture(model, SIZE), IMAGES)


def test_a_graph_of_another_function_is_refused_and_its_own_is_not() -> None:
    model, other = around(lambda x: x), around(lambda x: x)
    check_graph(model, capture(model, SIZE), IMAGES)
    with torch.no_grad():
        other.head.weight[2] *= 1.5
    with pytest.raises(InputError, match="captured graph computes another output"):
        check_graph(model, capture(other, SIZE), IMAGES)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (nn.Module.train, "training mode"),
        (nn.Module.half, "float16"),
        (nn.Module.double, "float64"),
        (nn.Module.bfloat16, "bfloat16"),
        (nn.DataParallel, "model.module"),
        (torch.compile, "compiled"),
    ],
)
def test_modules_in_another_state_are_refused_at_once(
    change: Callable[[nn.Module], nn.Module], said: str, tmp_path: Path
) -> None:
    model = change(around(lambda x: x))
    batch = Batch(IMAGES, torch.zeros(7, dtype=torch.long), [str(i) for i in range(7)])
    with pytest.raises(InputError, match=said):
        calibrate(
            model,
            ModelSpec(name="resnet10t"),
            batch,
            config(),
            load_recipe("w8a8", ["reconstruction.iterations=0"]),
            tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()


def test_one_part_left_in_training_mode_is_named() -> None:
    model = around(lambda x, drop: drop(x), nn.Dropout(0.5))
    check_module(model)
    model.parts[0].train()
    with pytest.raises(InputError, match=r"parts\.0"):
        check_module(model)


def test_a_network_without_pooling_is_no_classifier() -> None:
    model = create_model(ModelSpec(name="vit_tiny_patch16_224", kwargs={**TINY_VIT, "global_pool": ""}))
    captured = capture(model, SIZE)
    check_graph(model, captured, IMAGES)
    assert choose_task(None, output_shapes(captured.graph), SIZE)[0].name == "tensors"
    with pytest.raises(InputError, match=r"\(5, 4\) for an image, the task classify"):
        choose_task("classify", output_shapes(captured.graph), SIZE)


# What stays float


@pytest.mark.parametrize(
    ("kind", "middle", "part"),
    [
        ("conv1d", lambda x, m: m(x.flatten(2)).unflatten(2, (8, 8)), nn.Conv1d(8, 8, 3, padding=1)),
        ("conv_transpose2d", lambda x, m: m(x), nn.ConvTranspose2d(8, 8, 3)),
        ("conv3d", lambda x, m: m(x.unsqueeze(1)).squeeze(1), nn.Conv3d(1, 1, 3, padding=1)),
        ("bilinear", lambda x, m: m(x.mean((2, 3)), x.amax((2, 3))), nn.Bilinear(8, 8, 8)),
    ],
)
def test_products_that_stay_float_are_named(
    kind: str, middle: Callable[..., Tensor], part: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    graph = capture(around(middle, part), SIZE)
    assert len(quantizable_nodes(graph.graph)) == 2
    assert [name.split(" in ")[0] for name in float_products(graph)] == [kind]
    assert f"{kind} in parts.0" in caplog.text


def test_a_network_that_is_quantized_whole_has_no_such_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = around(lambda x, conv: conv(x) @ x.mT, nn.Conv2d(8, 8, 3, padding=1, groups=8))
    graph = capture(model, SIZE)
    assert float_products(graph) == []
    assert len(quantizable_nodes(graph.graph)) == 4
    assert "stay float" not in caplog.text


# Images that say nothing


def test_calibration_images_of_one_colour_are_refused_and_copies_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    black = torch.tensor([-2.1179, -2.0357, -1.8044]).reshape(1, 3, 1, 1).expand(7, 3, 16, 16)
    with pytest.raises(InputError, match="of one colour"):
        check_images(black)
    # Grey in several shades is not much, but not nothing.
    assert check_images(black * torch.linspace(0.5, 1.0, 7).reshape(-1, 1, 1, 1)) == 7
    assert check_images(IMAGES) == 7
    assert "distinct" not in caplog.text
    assert check_images(torch.cat([IMAGES, IMAGES[:2]])) == 7
    assert "only 7 of the 9 calibration images are distinct" in caplog.text


def test_activations_that_never_change_are_named(caplog: pytest.LogCaptureFixture) -> None:
    dead = around(lambda x, conv: conv(F.relu(x - 1e6)), nn.Conv2d(8, 8, 1))
    network = insert_quantizers(capture(dead, SIZE), integers(8, 8))
    with caplog.at_level(logging.WARNING):
        observe(network, IMAGES, batch_size=7, seed=0)
    assert "parts.0.input" in caplog.text
    assert "stem.input" not in caplog.text


@pytest.mark.parametrize("value", [-3.0, 0.7, 250.0])
def test_the_range_of_a_constant_leaves_room_for_other_values(value: float) -> None:
    found = search_activation_range(compress(torch.full((100,), value)), 8, may_shift=True)
    assert found.grid is Grid.SYMMETRIC
    x = torch.tensor([0.0, 0.5 * value, value])
    values = q.fake_quantize(x, torch.tensor(found.scale), found.levels)
    assert float((values - x).abs().max()) <= 0.02 * abs(value)


# Small and large numbers


@pytest.mark.parametrize("factor", [1e-6, 1e-9, 1e-14])
def test_small_weights_and_activations_keep_their_digits(factor: float) -> None:
    weight = torch.randn(4, 50, generator=torch.Generator().manual_seed(2))
    weight[3] = 0.0
    scale = search_weight_scale(weight * factor, q.symmetric_levels(8))
    assert bool((scale > 0).all())
    torch.testing.assert_close(
        scale[:3] / factor, search_weight_scale(weight, q.symmetric_levels(8))[:3], rtol=1e-5, atol=0
    )
    for bits in (4, 8):
        small = search_activation_range(compress(weight * factor), bits, may_shift=True)
        plain = search_activation_range(compress(weight), bits, may_shift=True)
        assert (small.grid, small.levels) == (plain.grid, plain.levels)
        assert small.scale / factor == pytest.approx(plain.scale, rel=1e-4)


def test_a_layer_of_tiny_weights_before_a_large_factor_is_quantized_like_any_other() -> None:
    def middle(x: Tensor, linear: nn.Module) -> Tensor:
        return linear(x.mean((2, 3))) * 1e9  # type: ignore[no-any-return]

    model = around(middle, nn.Linear(8, 8, bias=False))
    with torch.no_grad():
        model.parts[0].weight.mul_(1e-9)
    network = insert_quantizers(capture(model, SIZE), integers(8, 8))
    observe(network, IMAGES, batch_size=7, seed=0)
    network.set_mode(Mode.QUANTIZE)
    with torch.no_grad():
        error = (network.module(IMAGES) - model(IMAGES)).abs().max()
    assert float(error) < 0.02


def test_fp16_is_judged_by_the_largest_magnitude() -> None:
    fine = [0.0, 1.0, -65504.0, [1.0, 1e-9], [math.inf, 1.0], 6.1e-5, []]
    lost = [1e-12, 1e-8, 65600.0, -1e9, [3e-7, 1e-7], [1.0, 1e6]]
    assert [fits_fp16(np.array(x)) for x in fine] == [True] * len(fine)
    assert [fits_fp16(np.array(x)) for x in lost] == [False] * len(lost)


def test_small_biases_move_nothing_out_of_fp16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = around(lambda x, conv: F.relu(conv(x)), nn.Conv2d(8, 8, 3, padding=1))
    with torch.no_grad():
        model.stem.bias.mul_(1e-7)
        model.head.bias.mul_(1e-7)
    graph = capture(model, SIZE)

    def written() -> bytes:
        path = tmp_path / "h.onnx"
        write_onnx(graph, path, input_size=SIZE, batch_size=7, metadata={}, passes=(to_half,))
        return path.read_bytes()

    careful = written()
    monkeypatch.setattr("ospq_export.onnx.half.fits_fp16", lambda array, tiny=False: True)
    assert written() == careful


BEYOND_FP16: dict[str, Callable[[Tensor], Tensor]] = {
    "normalize": lambda x: F.normalize(F.relu(x - 50.0), dim=1),
    "small number": lambda x: (x * 1e-8) * 1e8,
    "small vector": lambda x: x * torch.full((8, 1, 1), 2e-8) * 5e7,
    "large number": lambda x: x * 1e6 / 1e6,
    "mask": lambda x: (x.flatten(2) + torch.tensor([0.0, -1e9] * 32)).softmax(-1).unflatten(2, (8, 8)),
    "root": lambda x: x / x.square().sum(1, keepdim=True).add(1e-10).sqrt().expand(-1, 8, -1, -1),
}


@pytest.mark.parametrize(
    "names", [["normalize", "small number", "mask"], ["small vector", "large number", "root"]]
)
def test_constants_beyond_fp16_keep_their_meaning(names: list[str], tmp_path: Path) -> None:
    model = around(lambda x: sum((BEYOND_FP16[name](x) for name in names), x))
    graph = capture(model, SIZE)
    write_onnx(graph, tmp_path / "h.onnx", input_size=SIZE, batch_size=7, metadata={}, passes=(to_half,))
    with torch.no_grad():
        wanted = model(IMAGES)
        torch.testing.assert_close(run_onnx(tmp_path / "h.onnx", IMAGES), wanted, rtol=0, atol=2e-3)
        torch.testing.assert_close(HalfNetwork(graph)(IMAGES), wanted, rtol=0, atol=2e-3)


# Files and names


def test_numbers_that_json_does_not_have_are_written_as_strings() -> None:
    value = {"a": [1.5, math.nan], "b": {"c": (math.inf, -math.inf)}, "d": 3, "e": None}

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    for text in (json_text(value), json_line(value)):
        read = json.loads(text, parse_constant=refuse)
        assert read == {"a": [1.5, "NaN"], "b": {"c": ["Infinity", "-Infinity"]}, "d": 3, "e": None}


@pytest.mark.parametrize("path", ["run[red]a", "run[/b]", "a[1]/[bold]b", "x" * 200])
def test_a_path_is_printed_as_it_is(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    say(f"in {path}")
    assert capsys.readouterr().out == f"in {path}\n"


def test_a_recipe_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    from importlib import resources

    text = resources.files("ospq_export.recipes").joinpath("w8a8.toml").read_text(encoding="utf-8")
    (tmp_path / "windows.toml").write_text("# Maße\n" + text, encoding="utf-8-sig", newline="\r\n")
    assert load_recipe(str(tmp_path / "windows.toml"), []) == load_recipe("w8a8", [])


@pytest.mark.parametrize("seed", ["-1", str(2**70)])
def test_an_impossible_seed_is_bad_input(seed: str, tmp_path: Path) -> None:
    arguments = [
        "calibrate",
        "resnet10t",
        "--data",
        str(tmp_path),
        "--out",
        str(tmp_path / "r"),
        "--seed",
        seed,
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "--seed" in result.output


# Already right


def test_operators_that_exporters_get_wrong_are_the_same_in_the_file_at_every_batch(tmp_path: Path) -> None:
    """Uneven "same" padding, dilation, groups, other paddings, pools, resizing, activations, norms: one network."""

    def middle(x: Tensor, *parts: nn.Module) -> Tensor:
        for part in parts:
            x = part(x)
        x = F.adaptive_avg_pool2d(x, 5)
        x = x + F.interpolate(F.hardswish(x), size=(5, 5), mode="bicubic")
        x = F.interpolate(x, size=(7, 9), mode="bilinear", align_corners=True)
        x = F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False)
        x = F.gelu(x) + F.gelu(x, approximate="tanh") + F.hardsigmoid(x)
        return F.normalize(x, dim=1) + torch.roll(x, (1, -1), (2, 3))

    parts = [
        nn.Conv2d(8, 8, 4, padding="same"),
        nn.Conv2d(8, 8, (2, 3), dilation=(3, 2), padding="same", groups=4),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1, groups=8)),
        trained_norm(8, eps=1e-3),
        nn.Conv2d(8, 8, 1),
        trained_norm(8, affine=False),
        nn.GroupNorm(4, 8),
    ]
    model = around(middle, *parts)
    graph = capture(model, SIZE)
    write_onnx(graph, tmp_path / "f.onnx", input_size=SIZE, batch_size=None, metadata={})
    with torch.no_grad():
        for count in (1, 3, 7):
            images, wanted = IMAGES[:count], model(IMAGES[:count])
            torch.testing.assert_close(graph(images), wanted, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(run_onnx(tmp_path / "f.onnx", images), wanted, rtol=1e-4, atol=1e-5)
