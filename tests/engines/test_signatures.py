"""Every name of TensorRT's that is used here exists in each version, or is asked for before; as the real bindings have them.

signatures.json was read from the bindings' wheels by scripts/tensorrt_signatures.py: their libraries cannot run here.
"""

import ast
import json
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
from onnx import TensorProto, helper

from ospq_export.engines.build import _precision_flags, _strongly_typed

ROOT = Path(__file__).parents[2]
VERSIONS = json.loads((Path(__file__).parent / "signatures.json").read_text())
SOURCES = [
    *(
        ROOT / "ospq_export" / "engines" / f"{name}.py"
        for name in ("build", "products", "profiles", "record")
    ),
    ROOT / "ospq_export/validate/executions/loaded.py",
    ROOT / "ospq_export/export/device/runtimes.py",
    ROOT / "examples/tensorrt_runtime.py",
]
MODULES = ("trt", "tensorrt", "module")
OBJECTS = {
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "config": "IBuilderConfig",
    "network": "INetworkDefinition",
    "inspector": "EngineInspector",
    "builder": "Builder",
    "parser": "OnnxParser",
}
# Polygraphy's module of settings is called as a builder's are.
OTHERS = {("IBuilderConfig", "USE_TENSORRT_RTX")}
# What the code asks for with hasattr or getattr before it uses it, and the versions without it.
ASKED = {
    ("NetworkDefinitionCreationFlag", "STRONGLY_TYPED"): {"8.6"},
    ("NetworkDefinitionCreationFlag", "EXPLICIT_BATCH"): {"11"},
    ("BuilderFlag", "FP16"): {"11"},
    ("BuilderFlag", "INT8"): {"11"},
}


def used(path):
    """(class, member) of every use of an enumeration or a method, by the names that these variables have everywhere here."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Attribute):
            continue
        value = node.value
        if (
            isinstance(value, ast.Attribute)
            and isinstance(value.value, ast.Name)
            and value.value.id in MODULES
        ):
            yield value.attr, node.attr
        name = value.attr if isinstance(value, ast.Attribute) else getattr(value, "id", "")
        if name in OBJECTS:
            yield OBJECTS[name], node.attr


def test_the_code_uses_what_is_looked_for():
    found = {pair for path in SOURCES for pair in used(path)}
    assert {("BuilderFlag", "TF32"), ("ICudaEngine", "get_tensor_profile_shape")} <= found
    assert found > OTHERS and {("IExecutionContext", "execute_async_v3"), ("TensorIOMode", "INPUT")} <= found


@pytest.mark.parametrize("version", VERSIONS)
def test_every_name_exists_or_is_asked_for(version):
    names = VERSIONS[version]["names"]
    known = {kind for found in VERSIONS.values() for kind in found["names"]}
    missing = {
        (path.name, kind, member)
        for path in SOURCES
        for kind, member in used(path)
        if kind in known
        and not member.startswith("__")
        and (kind, member) not in OTHERS
        and member not in names.get(kind, ())
        and version not in ASKED.get((kind, member), ())
    }
    assert missing == set()


def module_of(version):
    """A namespace with the names of a version, and nothing behind them."""
    found = VERSIONS[version]["names"].items()
    return SimpleNamespace(**{kind: SimpleNamespace(**dict.fromkeys(members)) for kind, members in found})


@pytest.fixture
def quantized(tmp_path):
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s"], ["y"]),
    ]
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy"]
    scale = helper.make_tensor("s", TensorProto.FLOAT, [], [1.0])
    onnx.save(
        helper.make_model(helper.make_graph(nodes, "g", value[:1], value[1:], [scale])), tmp_path / "q.onnx"
    )
    return tmp_path / "q.onnx"


@pytest.mark.parametrize("version", VERSIONS)
def test_precision_is_said_by_flags_where_types_do_not_say_it(version, quantized):
    trt = module_of(version)
    assert _strongly_typed(trt) is (version != "8.6")
    expected = {"fp16": True, "int8": True} if version == "8.6" else {}
    assert _precision_flags(trt, quantized) == expected
