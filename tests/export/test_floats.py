"""FP8 and NVFP4 from the choice of formats to ONNX: the files hold the quantizers' bytes and compute the network."""

import ml_dtypes
import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from ospq_export.calibrate.observe import observe
from ospq_export.engines.build import BuildSettings, build
from ospq_export.engines.products import Product
from ospq_export.errors import InputError
from ospq_export.export.expand import needs_expansion, write_expanded
from ospq_export.export.lower import finishers
from ospq_export.export.lower.graph import highest_opset, probe_names
from ospq_export.export.lower.graph import lower as lowered
from ospq_export.formats.base import Role
from ospq_export.formats.choice import Choice
from ospq_export.graph.capture import capture
from ospq_export.graph.insertion import insert_quantizers
from ospq_export.graph.quantizers import Mode
from ospq_export.models.record import ModelSpec
from ospq_export.models.timm import create_model
from ospq_export.onnx.names import DYNAMIC_QUANTIZE
from ospq_export.onnx.write import write_onnx
from ospq_export.recipes import load_recipe
from ospq_export.validate.executions.probes import BLOCK_SCALES, CODES, inner_tensors, read_proto

FP8 = Choice("fp8", "fp8", "fp8", "fp8")
NVFP4 = Choice("nvfp4", "nvfp4", "fp8", "fp8")
WITHOUT = ["QDQSelectorActionTransformer"]


class Written:
    """A network that was observed, lowered and written."""

    def __init__(self, captured, images, choice, folder, batch_size=None):
        self.network, self.images = insert_quantizers(captured, choice), images
        observe(self.network, images, batch_size=16, seed=0)
        self.network.set_mode(Mode.QUANTIZE)
        self.path = self.runnable = folder / "model.onnx"
        probes = probe_names(self.network, [])
        write_onnx(
            lowered(self.network, probes),
            self.path,
            input_size=tuple(images.shape[1:]),
            batch_size=batch_size,
            metadata={},
            opset=highest_opset(self.network),
            passes=finishers(self.network),
            probes=list(probes.values()),
        )
        self.model = onnx.load(str(self.path))
        if needs_expansion(onnx_ir.load(self.path)):
            self.runnable = folder / "check.onnx"
            write_expanded(self.path, self.runnable)
        self.held = {t.name: t for t in self.model.graph.initializer}

    def expected(self):
        with torch.no_grad():
            return self.network.module(self.images).numpy()

    def run(self, optimize):
        options, level = onnxruntime.SessionOptions(), onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
        options.log_severity_level, providers = 3, ["CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(
            str(self.runnable), options, providers=providers, disabled_optimizers=WITHOUT
        )
        return session.run(None, {"images": self.images.numpy()})[0]


@pytest.fixture(scope="module")
def written(small_vit, noise, tmp_path_factory):
    """The small ViT in both choices; do not change it."""
    folder = tmp_path_factory.mktemp("written")
    made = {}
    for name, choice, batch_size in (("fp8", FP8, None), ("nvfp4", NVFP4, len(noise))):
        (folder / name).mkdir()
        made[name] = Written(small_vit, noise, choice, folder / name, batch_size)
    return made


@pytest.fixture(scope="module")
def swin(tmp_path_factory):
    """A Swin whose linears read four dimensions, in NVFP4."""
    torch.manual_seed(0)
    kwargs = {"img_size": 32, "window_size": 4, "depths": (1, 1), "num_heads": (1, 2), "embed_dim": 16}
    model = create_model(ModelSpec(name="swin_tiny_patch4_window7_224", kwargs={"num_classes": 5, **kwargs}))
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return Written(capture(model, (3, 32, 32)), images, NVFP4, tmp_path_factory.mktemp("swin"))


def assert_close(found, expected):
    # A float32 sum in another order moves a value across a rounding edge now and then.
    assert found.shape == expected.shape and np.abs(found - expected).mean() < 0.01 * expected.std()


@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
@pytest.mark.parametrize("optimize", [True, False])
def test_onnx_runtime_computes_the_fake_quantized_network(written, small_vit, name, optimize):
    one = written[name]
    assert_close(one.run(optimize), one.expected())
    with torch.no_grad():
        original = small_vit(one.images).numpy()
    assert np.abs(one.run(optimize) - original).mean() > 0.02 * original.std(), "it is quantized"


@pytest.mark.slow
@pytest.mark.parametrize("optimize", [True, False])
def test_a_swin_computes_the_fake_quantized_network(swin, optimize):
    assert_close(swin.run(optimize), swin.expected())


@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
def test_the_file_holds_fp8_bytes_and_scales(written, name):
    one = written[name]
    for quantizer in one.network.weights.values():
        if quantizer.format.name != "fp8":
            continue
        codes = one.held[f"{quantizer.name}.codes"]
        assert codes.data_type == TensorProto.FLOAT8E4M3FN
        wanted = quantizer.codes if quantizer.codes.dim() == 4 else quantizer.codes.t()
        np.testing.assert_array_equal(
            numpy_helper.to_array(codes).view(np.uint8), wanted.contiguous().view(torch.uint8).numpy()
        )
        scale = numpy_helper.to_array(one.held[f"{quantizer.name}.scale"])
        np.testing.assert_array_equal(scale, quantizer.scale.numpy())
    for quantizer in one.network.activations.values():
        scale = numpy_helper.to_array(one.held[f"{quantizer.name}.scale"])
        assert scale.shape == () and scale == quantizer.scale.numpy()
    static = [n for n in one.model.graph.node if n.op_type == "QuantizeLinear"]
    assert len(static) == sum(a.format.name == "fp8" for a in one.network.activations.values())
    assert {one.held[n.input[2]].data_type for n in static} == {TensorProto.FLOAT8E4M3FN}
    assert one.model.opset_import[0].version == (20 if name == "fp8" else 23)


def nibbles(tensor):
    """Levels of a packed FLOAT4E2M1 tensor, the low half of a byte first."""
    table = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    packed = np.frombuffer(tensor.raw_data, np.uint8)
    return table[np.stack([packed & 15, packed >> 4], 1).ravel()].reshape(tensor.dims)


def test_the_file_holds_fp4_codes_and_scales(written):
    one = written["nvfp4"]
    quantizers = [w for w in one.network.weights.values() if w.format.name == "nvfp4"]
    assert len(quantizers) == 2 * 4
    for quantizer in quantizers:
        codes, scale = one.held[f"{quantizer.name}.codes"], one.held[f"{quantizer.name}.scale"]
        assert (codes.data_type, scale.data_type) == (TensorProto.FLOAT4E2M1, TensorProto.FLOAT8E4M3FN)
        np.testing.assert_array_equal(2 * nibbles(codes), quantizer.codes.numpy())
        tensor_scale = numpy_helper.to_array(one.held[f"{quantizer.name}.tensor_scale"])
        assert tensor_scale == quantizer.tensor_scale.numpy()
        stored = numpy_helper.to_array(scale).astype(np.float32)
        np.testing.assert_array_equal(stored * tensor_scale, quantizer.scale.numpy())


def ranks_of_inputs(one):
    inferred = onnx.shape_inference.infer_shapes(one.model)
    shapes = {v.name: len(v.type.tensor_type.shape.dim) for v in inferred.graph.value_info}
    return [shapes[n.input[0]] for n in one.model.graph.node if n.op_type == DYNAMIC_QUANTIZE]


@pytest.mark.slow
def test_fp4_operators_have_three_dimensions(swin, written):
    sites = {f"quantizers.{n.replace('.', '__')}": a for n, a in swin.network.activations.items()}
    calls = [n for n in swin.network.module.graph.nodes if str(n.target) in sites]
    four_bits = [n for n in calls if sites[n.target].format.name == "nvfp4"]
    assert {n.args[0].meta["val"].dim() for n in four_bits} == {3, 4}
    assert set(ranks_of_inputs(swin)) == set(ranks_of_inputs(written["nvfp4"])) == {3}
    assert len(ranks_of_inputs(swin)) == len(four_bits) == 2 * 4 + 1


class TRT_FP4DynamicQuantize(OpRun):
    """TensorRT's operator by DESIGN's arithmetic, block by block, for ONNX's reference evaluator."""

    op_domain = "trt"

    def _run(self, x, tensor_scale, axis, block_size, scale_type):
        assert (axis, block_size, scale_type, x.ndim) == (-1, 16, TensorProto.FLOAT8E4M3FN, 3)
        grouped = x.reshape(*x.shape[:-1], -1, 16)
        ratio = np.abs(grouped).max(-1) / (np.float32(6) * tensor_scale)
        scales = np.clip(ratio, np.float32(2**-9), np.float32(448)).astype(ml_dtypes.float8_e4m3fn)
        scaled = grouped / (scales.astype(np.float32) * tensor_scale)[..., None]
        return np.clip(scaled, -6, 6).astype(ml_dtypes.float4_e2m1fn).reshape(x.shape), scales


def in_reference(one):
    evaluator = ReferenceEvaluator(one.model, new_ops=[TRT_FP4DynamicQuantize])
    return evaluator.run(None, {"images": one.images.numpy()})[0]


def test_the_deployed_file_itself_in_the_reference_evaluator(written):
    one = written["nvfp4"]
    assert_close(in_reference(one), one.expected())
    assert_close(one.run(optimize=False), in_reference(one))


@pytest.mark.slow
def test_the_deployed_swin_itself_in_the_reference_evaluator(swin):
    assert_close(in_reference(swin), swin.expected())


class Stem(torch.nn.Module):
    """A convolution over an image of three channels, and a head."""

    def __init__(self, kernel, stride, padding, bias=True):
        super().__init__()
        self.proj = torch.nn.Conv2d(3, 8, kernel, stride, padding, bias=bias)
        self.fc, self.head = torch.nn.Linear(8, 8), torch.nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.fc(self.proj(x).flatten(2).mean(2)).relu())


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "bias", "kinds"),
    [
        ((8, 6), (8, 6), 0, True, []),
        (8, 8, 0, False, []),
        (4, 4, 0, True, ["Conv"]),
        (7, 2, 3, True, ["Conv"]),
        (8, 4, 0, True, ["Conv"]),
        (9, 9, 0, True, ["Conv"]),
    ],
)
def test_a_convolution_over_large_patches_is_a_linear(tmp_path, kernel, stride, padding, bias, kinds):
    torch.manual_seed(0)
    captured = capture(Stem(kernel, stride, padding, bias).eval(), (3, 16, 24))
    one = Written(captured, torch.randn(6, 3, 16, 24), FP8, tmp_path)
    assert [n.op_type for n in one.model.graph.node if n.op_type == "Conv"] == kinds
    np.testing.assert_allclose(one.run(optimize=False), one.expected(), rtol=1e-4, atol=1e-5)


def test_what_falls_back_and_why():
    for name in ("nvfp4", "fp8"):
        plain = Choice(name, name, name, name).operands("fc", Role.LINEAR, 64, is_end=False)
        assert (plain.weight.name, plain.activation.name, plain.reason) == (name, name, "")
    choice = Choice("nvfp4", "nvfp4", "nvfp4", "nvfp4")
    for role, inner, reason in (
        (Role.CONVOLUTION, 64, "convolution has no FP4 kernel"),
        (Role.ATTENTION, 64, "attention has no FP4 kernel"),
        (Role.LINEAR, 24, "its inner dimension 24 is no multiple of 16"),
    ):
        found = choice.operands("op", role, inner, is_end=False)
        assert found.activation.name == "fp8" and found.reason == reason
        assert found.weight is None if role is Role.ATTENTION else found.weight.name == "fp8"
    ends = Choice("nvfp4", "nvfp4", "fp8", "int8").operands("head", Role.LINEAR, 64, is_end=True)
    assert (ends.weight.name, ends.activation.name) == ("int8", "int8")


def test_the_last_override_that_fits_counts():
    overrides = (("blocks.*", "fp8"), ("*.fc1", "float"), ("*.1.mlp.fc1", "int8"))
    choice = Choice("nvfp4", "nvfp4", "fp8", "fp8", overrides)
    names = {
        "blocks.0.mlp.fc2": "fp8",
        "blocks.0.mlp.fc1": None,
        "blocks.1.mlp.fc1": "int8",
        "other": "nvfp4",
    }
    for name, wanted in names.items():
        found = choice.operands(name, Role.LINEAR, 64, is_end=False)
        for format_ in (found.weight, found.activation):
            assert (None if format_ is None else format_.name) == wanted


def test_a_float_operator_has_no_quantizers(small_vit, noise, tmp_path):
    choice = Choice(
        "fp8", "fp8", "fp8", "fp8", (("*.fc1", "float"), ("blocks.0.attn.*", "float"), ("head", "float"))
    )
    one = Written(small_vit, noise[:8], choice, tmp_path)
    quantizers = [*one.network.activations, *one.network.weights, *one.network.biases]
    assert not [n for n in quantizers if ".fc1." in n or n.startswith(("blocks.0.attn.", "head"))]
    assert "blocks.0.mlp.fc2.weight" in quantizers and "blocks.1.attn.qkv.input" in quantizers
    assert_close(one.run(optimize=True), one.expected())


@pytest.mark.parametrize(("weight", "has"), [("int8", True), ("float", False)])
def test_only_quantized_weights_take_an_offset(small_vit, weight, has):
    network = insert_quantizers(small_vit, Choice(weight, "int8", "int8", "int8"))
    assert network.activations["blocks.0.mlp.fc2.input"].may_shift == has
    assert network.activations["head.input"].may_shift


def test_a_choice_that_quantizes_nothing_is_refused(small_vit):
    for choice in (Choice(*["float"] * 4), Choice("fp8", "fp8", "fp8", "fp8", (("*", "float"),))):
        with pytest.raises(InputError, match="every operator stays float"):
            insert_quantizers(small_vit, choice)


@pytest.mark.parametrize("pattern", ["patch_embed*", "blocks.0.attn.matmul*"])
def test_an_override_that_cannot_be_names_the_operator(small_vit, pattern):
    with pytest.raises(InputError, match=pattern.strip("*").replace(".", r"\.") + ".* cannot have nvfp4"):
        insert_quantizers(small_vit, Choice("fp8", "fp8", "fp8", "fp8", ((pattern, "nvfp4"),)))


def test_substitutions_are_recorded(small_vit):
    network = insert_quantizers(small_vit, Choice("nvfp4", "nvfp4", "nvfp4", "nvfp4"))
    assert network.substituted["patch_embed.proj"] == "convolution has no FP4 kernel"
    assert {r for n, r in network.substituted.items() if "attn" in n} == {"attention has no FP4 kernel"}
    assert "blocks.0.mlp.fc1" not in network.substituted


@pytest.mark.parametrize("pair", [("nvfp4", "int8"), ("int4", "fp8"), ("fp8", "nvfp4")])
def test_formats_that_no_hardware_multiplies_are_refused(pair):
    with pytest.raises(
        InputError, match="no hardware multiplies {} weights with {} activations".format(*pair)
    ):
        load_recipe("w4a8", [f"weights={pair[0]}", f"activations={pair[1]}"]).formats()


@pytest.mark.parametrize(
    "overrides",
    [
        ["weights=fp9"],
        ["weights=float", "activations=fp9"],
        ["weights=fp9", "activations=float"],
        ["attention=fp9"],
        ["ends=fp9"],
        ['overrides={"head"="fp9"}'],
    ],
)
def test_unknown_names_are_refused_with_the_list(overrides):
    with pytest.raises(InputError, match=r"no format 'fp9'.*") as refused:
        load_recipe("w4a8", overrides).formats()
    assert str(refused.value).endswith(": use fp8, int2, int3, int4, int5, int6, int7, int8, nvfp4 or float")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "capability"), [("fp8", "SM89"), ("nvfp4", "SM120")])
def test_an_engine_can_return_what_is_inside(written, name, capability):
    """Codes of FP8 and scales of blocks; FP4 has no type outside of an engine."""
    one = written[name]
    quantizers = one.network.activations.values()
    inside = [f"{a.name}{kind}" for a in quantizers for kind in (CODES, BLOCK_SCALES)]
    found = inner_tensors(read_proto(one.path), one.path, frozenset(inside))
    codes = [a.name for a in quantizers if a.format.name == "fp8"]
    assert {n for n in found.present if n.endswith(CODES)} == {f"{n}{CODES}" for n in codes} and codes
    batch = (1, 4, 4) if name == "fp8" else None
    settings = BuildSettings(Product.TENSORRT_RTX, batch, (capability,), tf32=False)
    built = build(one.path, settings, outputs=[*found.returned, *found.present])
    assert all(tensor.encode() in built.plan for tensor in found.present)
