"""Insertion of quantizers: what gets one, what shares one, how many bits, and that float mode changes nothing."""

import pytest
import torch
from torch import nn

from ospq_export.calibrate.observe import observe
from ospq_export.errors import InputError
from ospq_export.formats.choice import Choice, integers
from ospq_export.formats.search import Grid
from ospq_export.graph.capture import capture, quantizable_nodes
from ospq_export.graph.insertion import insert_quantizers
from ospq_export.graph.quantizers import Mode
from ospq_export.models.record import ModelSpec
from ospq_export.models.timm import create_model

aten = torch.ops.aten


def vit():
    torch.manual_seed(0)
    kwargs = {"img_size": 32, "depth": 2, "num_classes": 5}
    return capture(create_model(ModelSpec(name="vit_tiny_patch16_224", kwargs=kwargs)), (3, 32, 32))


@pytest.fixture(scope="module")
def network():
    return vit()


def test_float_mode_is_the_network_bit_for_bit(network):
    quantized = insert_quantizers(network, integers(4, 4))
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(quantized.module(x), network(x))


def test_every_operand_and_weight_has_a_quantizer(network):
    quantized = insert_quantizers(network, integers(4, 4))
    modules = dict(quantized.module.named_modules())
    for node in quantizable_nodes(quantized.module.graph):
        for operand in node.args[:2]:
            source = operand
            while source.op == "call_function" and source.target in (aten.transpose.int,):
                source = source.args[0]
            assert source.op == "call_module", f"{node.name} reads {operand.name} unquantized"
            assert str(source.target) in modules
    # Per block: qkv, q, k, softmax, v, proj, fc1, fc2; beside them patch embedding and head.
    assert len(quantized.activations) == 2 * 8 + 2
    assert len(quantized.weights) == 2 * 4 + 2


def test_first_and_last_operator_have_their_own_bits(network):
    quantized = insert_quantizers(network, integers(3, 4, first_last_bits=8))
    bits = {
        **{n: a.format.bits for n, a in quantized.activations.items()},
        **{n: w.format.bits for n, w in quantized.weights.items()},
    }
    eight = {name for name, b in bits.items() if b == 8}
    assert eight == {"patch_embed.proj.input", "patch_embed.proj.weight", "head.input", "head.weight"}
    assert bits["blocks.0.attn.qkv.weight"] == 3 and bits["blocks.1.mlp.fc2.input"] == 4


def test_keys_are_quantized_before_their_transpose(network):
    quantized = insert_quantizers(network, integers(8, 8))
    matmul = next(n for n in quantizable_nodes(quantized.module.graph) if n.target is aten.matmul.default)
    assert matmul.args[1].target is aten.transpose.int
    assert matmul.args[1].args[0].op == "call_module"


class Shared(nn.Module):
    """Three linears on one tensor, and a padded and an unpadded convolution."""

    def __init__(self):
        super().__init__()
        self.padded, self.plain = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 2)
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.plain(self.padded(x).relu()).flatten(2).transpose(1, 2).relu()
        y = self.q(x) + self.k(x) * self.v(x) + x
        return self.head(y.mean(1))


def test_one_tensor_has_one_quantizer_and_padding_forbids_an_offset():
    torch.manual_seed(0)
    quantized = insert_quantizers(capture(Shared().eval(), (3, 6, 6)), integers(8, 8))
    assert set(quantized.activations) == {"padded.input", "plain.input", "q.input", "head.input"}
    assert not quantized.activations["padded.input"].may_shift
    assert quantized.activations["plain.input"].may_shift and quantized.activations["q.input"].may_shift
    add = [n for n in quantized.module.graph.nodes if n.target is aten.add.Tensor][-1]
    assert all(n.op != "call_module" for n in add.all_input_nodes), "the residual sum reads the float tensor"


def test_a_tensor_read_at_two_bit_widths_gets_the_larger():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Linear(12, 4), nn.Linear(12, 4), nn.Linear(4, 2)

        def forward(self, x):
            x = x.flatten(1)
            return self.head(self.first(x) + self.second(x))

    quantized = insert_quantizers(capture(Net().eval(), (3, 2, 2)), integers(4, 4, first_last_bits=8))
    assert quantized.activations["first.input"].format.bits == 8
    assert quantized.weights["second.weight"].format.bits == 4


def test_weight_computed_from_images_is_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(12, 12)

        def forward(self, x):
            x = self.fc(x.flatten(1))
            return nn.functional.linear(x, x)

    with pytest.raises(InputError, match="computed from the images"):
        insert_quantizers(capture(Net().eval(), (3, 2, 2)), integers(8, 8))


@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.1), (4, 1.0)])
def test_observed_network_is_near_the_float_one(network, bits, tolerance):
    images = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    quantized = insert_quantizers(network, integers(bits, bits))
    observe(quantized, images, batch_size=8, seed=0)
    assert {a.format.grid for a in quantized.activations.values() if a.format.bits < 8} <= {Grid.EMBEDDED}
    for weight in quantized.weights.values():
        assert (
            weight.format.levels.lo <= int(weight.codes.min())
            and int(weight.codes.max()) <= weight.format.levels.hi
        )
        assert int(weight.codes.abs().max()) >= weight.format.levels.hi // 2, "the codes use their range"
    quantized.set_mode(Mode.QUANTIZE)
    with torch.no_grad():
        reference, ours = network(images), quantized.module(images)
    relative = float((ours - reference).square().mean() / reference.var())
    assert 0 < relative < tolerance


def test_observe_is_deterministic(network):
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    scales = []
    for _ in range(2):
        quantized = insert_quantizers(network, integers(4, 4))
        observe(quantized, images, batch_size=8, seed=3, values_per_tensor=1000)
        scales.append([float(a.scale) for a in quantized.activations.values()])
    assert scales[0] == scales[1]


def test_activation_that_is_not_finite_is_named(network):
    quantized = insert_quantizers(network, integers(8, 8))
    images = torch.full((2, 3, 32, 32), torch.inf)
    with pytest.raises(InputError, match=r"patch_embed\.proj\.input is not finite"):
        observe(quantized, images, batch_size=2, seed=0)


def test_what_reads_an_attention_has_its_format_where_that_has_more_bits(small_vit):
    """A Clip behind the attention would keep it from being one kernel; an override about the operator is the user's word."""

    def bits(choice):
        found = insert_quantizers(small_vit, choice)
        widths = {name: a.format.bits for name, a in found.activations.items() if name.endswith("proj.input")}
        return [widths[f"blocks.{i}.attn.proj.input"] for i in range(2)], found.substituted

    wide, said = bits(Choice("int4", "int4", "int8", "int8"))
    assert wide == [8, 8] and set(said) == {"blocks.0.attn.proj", "blocks.1.attn.proj"}
    assert "an attention's result" in said["blocks.0.attn.proj"]
    assert bits(Choice("int4", "int4", "int4", "int8")) == ([4, 4], {})
    assert bits(Choice("int8", "int8", "int4", "int8"))[0] == [8, 8]
    own = Choice("int4", "int4", "int8", "int8", (("blocks.1.attn.proj", "int4"),))
    assert bits(own)[0] == [8, 4]
    assert bits(Choice("int4", "int4", "fp8", "int8"))[0] == [4, 4], "its kernel gives float"
