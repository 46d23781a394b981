"""Checkpoints as trainers write them: every spelling gives the plain state dictionary's network, or a refusal that says why."""

import argparse
import gzip
import json
import logging
import pathlib
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ospq_export.demo import demo_spec
from ospq_export.errors import InputError
from ospq_export.models.record import CheckpointRecord, ModelSpec
from ospq_export.models.timm import create_model
from ospq_export.models.weights import checkpoint_record, load_checkpoint

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
SPEC = ModelSpec(name="vit_tiny_patch16_224", kwargs=SMALL)
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def demo() -> State:
    """The packaged ViT's weights."""
    return load_file(Path(str(demo_spec("vit").checkpoint)))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def logits(images: Tensor) -> Tensor:
    with torch.no_grad():
        return create_model(demo_spec("vit"))(images)


def loaded(path: Path, key: str | None = None, name: str = "vit") -> tuple[nn.Module, CheckpointRecord]:
    spec = demo_spec(name).model_copy(update={"checkpoint": str(path), "checkpoint_key": key})
    model = create_model(spec)
    record = checkpoint_record(model)
    assert record is not None
    return model, record


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def noise(state: State) -> State:
    """Other weights of the same network."""
    return {
        key: torch.randn_like(value) if value.is_floating_point() else value for key, value in state.items()
    }


def trainer(state: Any) -> dict[str, Any]:
    """What lies beside the weights in a trainer's file."""
    moments = {i: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2, 3)} for i in range(3)}
    return {
        "epoch": 3,
        "arch": "vit",
        "args": argparse.Namespace(lr=0.1, output=pathlib.PosixPath("/tmp/out")),
        "best": np.float64(90.75),
        "metric": torch.tensor(1.0),
        "optimizer": {"state": moments, "param_groups": [{"lr": torch.tensor(0.1), "params": [0, 1, 2]}]},
        "scheduler": {"last_epoch": 3},
        "weights_of": state,
    }


WRAPPERS: dict[str, Callable[[State], Any]] = {
    **{
        name: lambda s, name=name: {name: s, "epoch": 3}
        for name in (
            "state_dict", "model", "module", "model_state_dict", "net", "network", "weights", "params", "params_ema",
            "ema", "model_ema", "teacher", "student", "model_state", "generator",
        )
    },
    "nested": lambda s: {"state": {"model": s, "optimizer": {}}},
    "deep": lambda s: {"checkpoint": {"trainer": {"ema": {"module": s}}}},
    "in a list": lambda s: {"models": [s]},
    "ordered": lambda s: OrderedDict(state_dict=OrderedDict(s)),
    "trainer": trainer,
}  # fmt: skip


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_one_entry_that_fits_is_taken_and_said(
    tmp_path: Path,
    demo: State,
    images: Tensor,
    logits: Tensor,
    wrapper: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.save(WRAPPERS[wrapper](demo), tmp_path / "w.pth")
    model, record = loaded(tmp_path / "w.pth")
    with torch.no_grad():
        assert torch.equal(model(images), logits)
    assert record.entry and record.chosen == "only" and not record.others
    assert f"weights taken from '{record.entry}'" in caplog.text


PREFIXES = [
    "model.", "module.", "_orig_mod.", "backbone.", "net.", "encoder.", "any.name.at.all.", "0.",
    "module._orig_mod.model.", "_orig_mod.module.", "model._orig_mod.module.backbone.",
]  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("kind", ["pth", "safetensors", "wrapped"])
def test_a_prefix_of_all_names_is_stripped_and_said(
    tmp_path: Path, demo: State, images: Tensor, logits: Tensor, prefix: str, kind: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    state = prefixed(demo, prefix)
    save_file(state, path) if kind == "safetensors" else torch.save(
        {"x": state} if kind == "wrapped" else state, path
    )
    model, record = loaded(path)
    with torch.no_grad():
        assert torch.equal(model(images), logits)
    assert record.prefix == prefix.replace("_orig_mod.", "")
    if record.prefix:
        assert f"prefix '{record.prefix}' stripped" in caplog.text


def test_wrappers_in_the_middle_of_names(tmp_path: Path, demo: State, images: Tensor, logits: Tensor) -> None:
    state = {key.replace("blocks.1.", "blocks.1._orig_mod."): value for key, value in demo.items()}
    state = {
        key.replace("attn.", "_fsdp_wrapped_module._checkpoint_wrapped_module.attn."): v
        for key, v in state.items()
    }
    torch.save(state, tmp_path / "w.pth")
    with torch.no_grad():
        assert torch.equal(loaded(tmp_path / "w.pth")[0](images), logits)


def test_the_plain_file_is_taken_without_a_word(
    tmp_path: Path, demo: State, caplog: pytest.LogCaptureFixture
) -> None:
    save_file(demo, tmp_path / "w.safetensors")
    _, record = loaded(tmp_path / "w.safetensors")
    assert record == CheckpointRecord(dtypes=["float32"]) and not caplog.text


@pytest.mark.parametrize(
    ("plain", "average"),
    [("state_dict", "state_dict_ema"), ("model", "model_ema"), ("params", "params_ema"), ("net", "ema")],
)
def test_of_two_sets_the_average_is_taken_with_a_warning(
    tmp_path: Path, demo: State, images: Tensor, logits: Tensor, plain: str, average: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    torch.save({plain: noise(demo), average: demo}, tmp_path / "w.pth")
    model, record = loaded(tmp_path / "w.pth")
    with torch.no_grad():
        assert torch.equal(model(images), logits)
    assert (record.entry, record.chosen, record.others) == (average, "rule", [plain])
    assert repr(plain) in caplog.text and repr(average) in caplog.text and "`checkpoint_key`" in caplog.text


@pytest.mark.parametrize("key", ["state_dict", "model.", "ema_model", "nested.b", "state_dict_ema"])
def test_the_option_chooses_an_entry_or_a_prefix(
    tmp_path: Path, demo: State, images: Tensor, logits: Tensor, key: str
) -> None:
    def state(name: str) -> State:
        return demo if name == key else noise(demo)

    if key in ("model.", "ema_model"):
        content: Any = {**prefixed(state("model."), "model."), **prefixed(state("ema_model"), "ema_model.")}
    else:
        content = {name: state(name) for name in ("state_dict", "state_dict_ema")}
        content["nested"] = {"a": noise(demo), "b": state("nested.b")}
    torch.save(content, tmp_path / "w.pth")
    model, record = loaded(tmp_path / "w.pth", key)
    with torch.no_grad():
        assert torch.equal(model(images), logits)
    assert record.chosen == "option" and not record.others


def test_two_prefixes_that_fit_are_both_named(
    tmp_path: Path, demo: State, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save({**prefixed(demo, "model."), **prefixed(noise(demo), "ema_model.")}, tmp_path / "w.ckpt")
    _, record = loaded(tmp_path / "w.ckpt")
    assert (record.prefix, record.others) == ("ema_model.", ["model"])
    assert "'model'" in caplog.text and "'ema_model'" in caplog.text


def test_plain_names_beside_an_average_under_a_prefix(
    tmp_path: Path, demo: State, images: Tensor, logits: Tensor
) -> None:
    torch.save({**demo, **prefixed(noise(demo), "ema.")}, tmp_path / "w.pth")
    _, record = loaded(tmp_path / "w.pth")
    assert (record.prefix, record.others) == ("ema.", ["."])
    with torch.no_grad():
        assert torch.equal(loaded(tmp_path / "w.pth", ".")[0](images), logits)


def test_two_copies_of_one_network_are_no_choice(
    tmp_path: Path, demo: State, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(
        {"state_dict": demo, "state_dict_ema": {k: v.clone() for k, v in demo.items()}}, tmp_path / "w.pth"
    )
    _, record = loaded(tmp_path / "w.pth")
    assert record.chosen == "only" and "`checkpoint_key`" not in caplog.text


@pytest.mark.parametrize("key", ["ema", "state_dict.x", "epoch", "."])
def test_an_entry_that_is_not_there_is_refused_with_those_that_are(
    tmp_path: Path, demo: State, key: str
) -> None:
    torch.save({"state_dict": demo, "state_dict_ema": noise(demo), "epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"no entry .*state_dict, state_dict_ema") as caught:
        loaded(tmp_path / "w.pth", key)
    assert "\n" not in str(caught.value)


def test_an_entry_of_another_network_is_refused_by_name(tmp_path: Path, demo: State) -> None:
    torch.save({"state_dict": demo, "teacher": {"a": {"weight": torch.zeros(3)}}}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"not of this model: in 'teacher.a'"):
        loaded(tmp_path / "w.pth", "teacher")


def test_the_option_without_a_checkpoint_is_refused() -> None:
    with pytest.raises(InputError, match="`checkpoint_key` ema"):
        create_model(SPEC.model_copy(update={"checkpoint_key": "ema"}))


def test_what_lies_beside_the_prefix_is_left_aside_and_named(
    tmp_path: Path, demo: State, images: Tensor, logits: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    content = {**prefixed(demo, "model."), "criterion.weight": torch.ones(10), "n_averaged": torch.tensor(3)}
    torch.save({"state_dict": content}, tmp_path / "w.ckpt")
    model, record = loaded(tmp_path / "w.ckpt")
    with torch.no_grad():
        assert torch.equal(model(images), logits)
    assert record.aside == ["criterion.weight"] and record.ignored == ["n_averaged"]
    assert "left aside: criterion.weight" in caplog.text


def test_weights_that_the_network_lacks_are_refused(tmp_path: Path, demo: State) -> None:
    for surplus in ("head_dist.weight", "blocks.12.norm1.weight", "total_ops.weight"):
        torch.save({**demo, surplus: torch.zeros(10, 64)}, tmp_path / "w.pth")
        with pytest.raises(InputError, match=f"1 unknown: {surplus}"):
            loaded(tmp_path / "w.pth")


@pytest.mark.parametrize("missing", ["cls_token", "blocks.3.attn.qkv.bias", "norm.weight"])
def test_weights_that_are_missing_are_refused(tmp_path: Path, demo: State, missing: str) -> None:
    torch.save({k: v for k, v in demo.items() if k != missing}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=f"1 missing: {missing}"):
        loaded(tmp_path / "w.pth")


def norm_net() -> tuple[ModelSpec, nn.Module]:
    """A network with BatchNorm whose statistics matter."""
    torch.manual_seed(0)
    model = timm.create_model("tinynet_e", num_classes=4).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            module.num_batches_tracked.fill_(7)
    return ModelSpec(name="tinynet_e", kwargs={"num_classes": 4}), model


def test_counters_may_be_missing_and_surplus_but_statistics_may_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec, source = norm_net()
    x = torch.randn(2, 3, 64, 64)
    state = source.state_dict()
    counters = [key for key in state if key.endswith("num_batches_tracked")]
    fewer = {k: v for k, v in state.items() if k not in counters}
    more = {
        **state,
        "total_ops": torch.zeros(1),
        "blocks.0.total_params": torch.zeros(1, dtype=torch.float64),
    }
    stale = {**state, counters[0]: torch.zeros(1, dtype=torch.int32)}
    for content in (fewer, more, stale):
        torch.save(content, tmp_path / "w.pth")
        model = create_model(spec.model_copy(update={"checkpoint": str(tmp_path / "w.pth")}))
        with torch.no_grad():
            assert torch.equal(model(x), source(x))
    assert f"missing, without effect: {counters[0]}" in caplog.text
    assert "ignored, without effect: total_ops, blocks.0.total_params" in caplog.text
    gone = next(key for key in state if key.endswith("running_var"))
    torch.save({k: v for k, v in state.items() if k != gone}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="1 missing"):
        create_model(spec.model_copy(update={"checkpoint": str(tmp_path / "w.pth")}))


def test_weight_averaging_of_torch(tmp_path: Path, images: Tensor, logits: Tensor) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(create_model(demo_spec("vit")))
    torch.save(averaged.state_dict(), tmp_path / "w.pth")
    model, record = loaded(tmp_path / "w.pth")
    with torch.no_grad():
        assert torch.equal(model(images), logits)
    assert record.prefix == "module." and record.ignored == ["n_averaged"]


def test_buffers_that_the_network_computes_are_ignored_and_compared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = demo_spec("swin")
    source = create_model(spec)
    computed = {k: b for k, b in source.named_buffers() if k not in source.state_dict()}
    assert any("relative_position_index" in key for key in computed)
    torch.save({**source.state_dict(), **computed}, tmp_path / "w.pth")
    _, record = loaded(tmp_path / "w.pth", name="swin")
    assert set(record.ignored) == set(computed) and not record.differing
    name = next(key for key in computed if "relative_position_index" in key)
    torch.save({**source.state_dict(), name: computed[name].flip(0)}, tmp_path / "w.pth")
    _, record = loaded(tmp_path / "w.pth", name="swin")
    assert record.differing == [name] and f"other values of: {name}" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_read_as_float32(tmp_path: Path, demo: State, dtype: torch.dtype) -> None:
    torch.save({key: value.to(dtype) for key, value in demo.items()}, tmp_path / "w.pth")
    model, record = loaded(tmp_path / "w.pth")
    for key, value in model.state_dict().items():
        assert torch.equal(value, demo[key].to(dtype).float())
    assert record.dtypes == [str(dtype).removeprefix("torch.")]


def test_sparse_tensors_are_made_dense(tmp_path: Path, demo: State, images: Tensor, logits: Tensor) -> None:
    state = {
        **demo,
        "head.weight": demo["head.weight"].to_sparse(),
        "pos_embed": demo["pos_embed"].to_sparse(),
    }
    torch.save(state, tmp_path / "w.pth")
    with torch.no_grad():
        assert torch.equal(loaded(tmp_path / "w.pth")[0](images), logits)


ODD: dict[str, Callable[[Tensor], Tensor]] = {
    "torch.int8": lambda t: t.to(torch.int8),
    "torch.complex64": lambda t: t.to(torch.complex64),
    "torch.float8_e4m3fn": lambda t: t.to(torch.float8_e4m3fn),
    "torch.qint8": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "without data": lambda t: t.to("meta"),
}


@pytest.mark.parametrize("kind", ODD)
def test_tensors_that_are_no_float_weights_are_refused(tmp_path: Path, demo: State, kind: str) -> None:
    torch.save({**demo, "head.weight": ODD[kind](demo["head.weight"])}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=rf"head\.weight is \(10, 64\) {kind}"):
        loaded(tmp_path / "w.pth")


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": prefixed(s, "module.")}])
def test_another_number_of_classes_is_named(
    tmp_path: Path, demo: State, wrap: Callable[[State], Any]
) -> None:
    state = {**demo, "head.weight": torch.zeros(7, 64), "head.bias": torch.zeros(7)}
    torch.save(wrap(state), tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"7 classes for the model's 10.*num_classes=7"):
        loaded(tmp_path / "w.pth")


def test_a_backbone_alone_is_named(tmp_path: Path, demo: State) -> None:
    torch.save({k: v for k, v in demo.items() if not k.startswith("head.")}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="it has no classifier"):
        loaded(tmp_path / "w.pth")


def test_what_timms_filter_does_is_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    state = timm.create_model(SPEC.name, **SMALL).state_dict()
    torch.save({"state_dict": prefixed(state, "module.")}, tmp_path / "w.pth")
    model = timm.create_model(SPEC.name, **{**SMALL, "img_size": 64})
    record = load_checkpoint(model, tmp_path / "w.pth")
    assert (record.entry, record.prefix, record.adapted) == ("state_dict", "module.", True)
    assert record.resized == ["pos_embed"] and not record.dropped
    assert "resampled: pos_embed" in caplog.text
    assert checkpoint_record(model) == record


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def archive(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, b"x" * 100)
    return path


def torchscript(path: Path) -> Path:
    torch.jit.save(torch.jit.trace(nn.Linear(3, 2), torch.zeros(1, 3)), path)  # type: ignore[no-untyped-call]
    return path


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def onnx_file(path: Path) -> Path:
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])], "g", [value("x", TensorProto.FLOAT, [1])], [value("y", TensorProto.FLOAT, [1])]
    )  # fmt: skip
    return write(path, helper.make_model(graph).SerializeToString())


def cut(path: Path) -> Path:
    return write(path, path.read_bytes()[: path.stat().st_size * 3 // 4])


def numpy_archive(path: Path) -> Path:
    with path.open("wb") as file:
        np.savez(file, kernel=np.zeros(3))
    return path


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 22882424\n"
PAGE = b"<!DOCTYPE html>\n<html><head><title>Google Drive - Virus scan warning</title></head></html>"
INDEX = json.dumps(
    {
        "metadata": {},
        "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
    }
)
STATE = {"a.weight": torch.ones(64, 64)}
FOREIGN: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "LFS pointer": (lambda p: write(p, LFS), "Git LFS pointer", "git lfs pull"),
    "annex pointer": (lambda p: write(p, b"/annex/objects/SHA256E-s1--ab.pth\n"), "git-annex pointer", "annex get"),
    "page": (lambda p: write(p, PAGE), r"an HTML page \(Google Drive - Virus scan warning\)", "download it again"),
    "page after a comment": (lambda p: write(p, b"\n<!-- x -->\n<HTML>"), "an HTML page", "download it again"),
    "XML": (lambda p: write(p, b"<?xml version='1.0'?><Error>AccessDenied</Error>"), "XML", "download it again"),
    "empty": (lambda p: write(p, b""), "an empty file", "download it again"),
    "gzip": (lambda p: write(p, gzip.compress(b"x")), "gzip archive", "unpack it"),
    "zip": (lambda p: archive(p, "w/weights.pth", "readme.txt"), r"zip archive of .*weights\.pth", "unpack it"),
    "npz": (numpy_archive, "NumPy archive", "PyTorch"),
    "npy": (lambda p: write(p, b"\x93NUMPY\x01\x00"), "NumPy array", "torch.save"),
    "index": (lambda p: write(p, INDEX.encode()), "index of weights in 2 files", "join the files"),
    "JSON": (lambda p: write(p, b'{"error": "not found"}'), "JSON text", "download it again"),
    "ONNX": (onnx_file, "an ONNX model", "exported from"),
    "TorchScript": (torchscript, "TorchScript", "state_dict"),
    "GGUF": (lambda p: write(p, b"GGUF\x03\x00\x00\x00"), "GGUF", "original weights"),
    "HDF5": (lambda p: write(p, b"\x89HDF\r\n\x1a\n" + bytes(100)), "HDF5", "PyTorch"),
    "module": (lambda p: saved(p, nn.Linear(3, 2)), r"Python objects \(torch.nn.modules.linear.Linear", "state_dict"),
    "old module": (
        lambda p: saved(p, {"model": nn.Linear(3, 2)}, _use_new_zipfile_serialization=False),
        r"Python objects \(torch.nn.modules.linear.Linear", "state_dict",
    ),
    "cut torch file": (lambda p: cut(saved(p, STATE)), "cut short", "download it again"),
    "cut safetensors": (
        lambda p: (save_file(STATE, p), cut(p))[1], r"cut short: \d+ of \d+ bytes", "download it again"
    ),
    "text": (lambda p: write(p, b"not weights at all"), "no safetensors file and no torch file", "download it again"),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_checkpoint_is_named_with_what_to_do(tmp_path: Path, kind: str, suffix: str) -> None:
    make, what, fix = FOREIGN[kind]
    path = make(tmp_path / f"w{suffix}")
    with pytest.raises(InputError, match=what) as caught:
        load_checkpoint(nn.Linear(3, 2), path)
    assert fix in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize(("offset", "value"), [(6, b"\xff"), (46, b"\xa4")])
def test_a_damaged_directory_of_an_archive_is_one_line(tmp_path: Path, offset: int, value: bytes) -> None:
    """A version that nobody has, and a name that is not the UTF-8 that it says it is."""
    torch.save({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}, tmp_path / "w.pth")
    content = bytearray((tmp_path / "w.pth").read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 8 : entry + 10] = b"\x00\x08"
    content[entry + offset : entry + offset + len(value)] = value
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(InputError, match="cut short or damaged") as caught:
        load_checkpoint(nn.Linear(3, 2), tmp_path / "w.pth")
    assert "\n" not in str(caught.value) and str(tmp_path / "w.pth") in str(caught.value)


@pytest.mark.parametrize(
    ("files", "what"),
    [
        (["model.safetensors", "config.json"], "give a file in it: model.safetensors"),
        ([".metadata", "__0_0.distcp"], "dcp_to_torch_save"),
        (["zero_to_fp32.py"], "DeepSpeed"),
        ([], "Is a directory"),
    ],
)
def test_folders(tmp_path: Path, files: list[str], what: str) -> None:
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=what):
        load_checkpoint(nn.Linear(3, 2), tmp_path)


def test_a_file_is_read_by_its_content_not_by_its_name(
    tmp_path: Path, demo: State, images: Tensor, logits: Tensor
) -> None:
    save_file(demo, tmp_path / "w.pth")
    torch.save(demo, tmp_path / "w.safetensors")
    with torch.no_grad():
        for name in ("w.pth", "w.safetensors"):
            assert torch.equal(loaded(tmp_path / name)[0](images), logits)


def test_the_record_survives_json() -> None:
    record = CheckpointRecord(entry="a", others=["b"], chosen="rule", resized=["pos_embed"], adapted=True)
    assert CheckpointRecord.model_validate_json(record.model_dump_json()) == record


@pytest.fixture(autouse=True)
def _warnings(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
