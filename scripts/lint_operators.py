"""Ask TensorRT-RTX's parser which operators it has an importer for, and write the table that `lint` reads.

    python scripts/lint_operators.py

Every operator of ONNX's own domains that the installed onnx knows, in any version, and TensorRT's own are asked by name: the
parser looks at the name, not at the domain. Types of constants are tried, each in a file of one node.
"""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

import ospq_export.onnx.lint as package
from ospq_export.engines.products import Product, load, recorder

OWN = [
    *(
        f"TRT_{kind}{way}"
        for kind in ("FP8", "INT4", "MXFP8")
        for way in ("QuantizeLinear", "DequantizeLinear")
    ),
    *("TRT_FP4DynamicQuantize", "TRT_MXFP8DynamicQuantize", "TRT_BlockQuantize", "TRT_BlockDequantize"),
    *("TRT_DynamicQuantize", "GroupNormalization", "InstanceNormalization_TRT", "EfficientNMS_TRT"),
]


def main() -> None:
    """Write the table."""
    trt = load(Product.TENSORRT_RTX)
    builder = trt.Builder(recorder(Product.TENSORRT_RTX))
    parser = trt.OnnxParser(builder.create_network(0), recorder(Product.TENSORRT_RTX))
    asked = sorted({schema.name for schema in onnx.defs.get_all_schemas_with_history()} | set(OWN))
    table = {
        "made_with": f"tensorrt-rtx {trt.__version__}, onnx {onnx.__version__}",
        "operators": [name for name in asked if parser.supports_operator(name)],
        "constants": [
            name for name, kind in TensorProto.DataType.items() if kind and takes(trt, builder, kind)
        ],
    }
    Path(package.__file__).with_name("operators.json").write_text(json.dumps(table, indent=1) + "\n")


def takes(trt: object, builder: object, kind: int) -> bool:
    """Whether an unread initializer of this element type passes the parser."""
    if kind == TensorProto.STRING:
        return False
    value = TensorProto(
        name="c", data_type=kind, dims=[2], raw_data=bytes(-(-2 * ir.DataType(kind).bitwidth // 8))
    )
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y], [value])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    network = builder.create_network(0)  # type: ignore[attr-defined]
    log = recorder(Product.TENSORRT_RTX)
    return bool(trt.OnnxParser(network, log).parse(model.SerializeToString()))  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
