"""Ask the ONNX parser of a TensorRT that cannot run here which operators it has an importer for.

    pip download --no-deps --only-binary=:all: --python-version 3.10 --platform manylinux_2_17_x86_64 tensorrt==8.6.0
    unzip tensorrt-8.6.0-*.whl 'tensorrt/libnv*' -d FOLDER
    python scripts/lint_parser.py FOLDER/tensorrt

Prints the names. A builder needs a GPU; the parser's table does not: it is asked through the library's own interface
(`IParser::supportsOperator`, the fifth of its methods in 8.6) with a network and a logger that do nothing. The plugin library,
which needs cuDNN, is replaced by an empty one: what the parser makes with plugins (RoiAlign, NonMaxSuppression) is not among
the names.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
from pathlib import Path

import onnx

SUPPORTS_OPERATOR = 4
OWN = ("TRT_FP8QuantizeLinear", "TRT_FP8DequantizeLinear", "EfficientNMS_TRT")
# Every method of the object, and of the one that it points to, returns nothing.
STANDS_IN = """
static void *nothing(void) { return 0; }
static void *methods[1024], *object[1024];
int initLibNvInferPlugins(void *logger, const char *space) { return 1; }
void *stand_in(void) {
  for (int i = 0; i < 1024; i++) { methods[i] = nothing; object[i] = object; }
  object[0] = methods;
  return object;
}
"""


def supported(folder: Path, stand_in: ctypes.CDLL) -> list[str]:
    """Names of the operators that the parser in a folder of libraries takes, of those that any ONNX has."""
    ctypes.CDLL(str(folder / "libnvinfer.so.8"), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(folder / "libnvonnxparser.so.8"))
    stand_in.stand_in.restype = ctypes.c_void_p
    create = library.createNvOnnxParser_INTERNAL
    create.restype, create.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
    empty = stand_in.stand_in()
    parser = create(empty, empty, library.getNvOnnxParserVersion())
    methods = ctypes.cast(parser, ctypes.POINTER(ctypes.POINTER(ctypes.c_void_p)))[0]
    asks = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_char_p)(methods[SUPPORTS_OPERATOR] or 0)
    names = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if not schema.domain}
    return [name for name in sorted(names | set(OWN)) if asks(parser, name.encode())]


def main() -> None:
    """Build the libraries that stand in, then ask."""
    with tempfile.TemporaryDirectory() as made:
        path = Path(made) / "libnvinfer_plugin.so.8"
        command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(path), f"-Wl,-soname,{path.name}"]
        subprocess.run(command, input=STANDS_IN, text=True, check=True)
        stand_in = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        sys.stdout.write("\n".join(supported(Path(sys.argv[1]), stand_in)) + "\n")


if __name__ == "__main__":
    main()
