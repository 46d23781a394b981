"""Writes tests/engines/signatures.json: which names each version of TensorRT has in Python.

python scripts/tensorrt_signatures.py

It downloads the wheels of the bindings (about 1 MB each) and imports them beside empty libraries, which hold only the symbols
that they ask for: enough to read names, flags and enumerations, not to build. It needs gcc, nm and readelf.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

TARGET = Path(__file__).parents[1] / "tests" / "engines" / "signatures.json"
WHEELS = {
    "8.6": "tensorrt-bindings==8.6.1",
    "10.0": "tensorrt-cu12-bindings==10.0.1",
    "10.3": "tensorrt-cu12-bindings==10.3.0",
    "10.9": "tensorrt-cu12-bindings==10.9.0.34",
    "10.13": "tensorrt-cu12-bindings==10.13.3.9",
    "11": "tensorrt-cu13-bindings==11.4.0.106",
}
# Of what Python has: everything that builds, loads or runs an engine.
KEPT = (
    "Builder",
    "BuilderFlag",
    "HardwareCompatibilityLevel",
    "IBuilderConfig",
    "INetworkDefinition",
    "LayerInformationFormat",
    "IProgressMonitor",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "OnnxParser",
    "IOptimizationProfile",
    "DataType",
    "EngineInspector",
    "ICudaEngine",
    "IExecutionContext",
    "Runtime",
    "TensorIOMode",
    "ILogger",
    "ITimingCache",
    "ITensor",
    "ComputeCapability",
    "ProfilingVerbosity",
    "Logger",
)
_DUMP = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("tensorrt", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
found = {n: sorted(m for m in dir(getattr(module, n)) if m[0] != "_") for n in sys.argv[2:] if hasattr(module, n)}
print(json.dumps(found))
"""
# Of the C library and of Python, which the process has.
_OWN = re.compile(r"@|^(Py|_Py|_ZTI|_ZTV|__|_ITM|_ZG|dl(open|close|sym)$|pthread_)")


def output(*command: object) -> str:
    """What a command prints."""
    return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True).stdout


def stubbed(library: Path, folder: Path) -> None:
    """Libraries that hold the symbols which a binding asks for, as functions that return 0."""
    asked = [line.split()[-1] for line in output("nm", "-D", "-u", library).splitlines()]
    source, names = folder / "stub.c", [name for name in asked if not _OWN.search(name)]
    source.write_text(
        "".join(
            f'long f{i}(void) __asm__("{n}"); long f{i}(void){{return 0;}}\n' for i, n in enumerate(names)
        )
    )
    for name in re.findall(r"\[(libnv\S+)\]", output("readelf", "-d", library)):
        output("gcc", "-shared", "-fPIC", "-o", folder / name, f"-Wl,-soname,{name}", source)


def signatures(wheel: str, folder: Path) -> dict[str, list[str]]:
    """Members of each class of a version."""
    output(
        sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", folder, wheel
    )
    zipfile.ZipFile(next(folder.glob("*.whl"))).extractall(folder)
    library = next(folder.glob("*/tensorrt.so"))
    stubbed(library, folder)
    command = ["env", f"LD_LIBRARY_PATH={folder}", sys.executable, "-c", _DUMP, library, *KEPT]
    return dict(json.loads(output(*command)))


def main() -> None:
    """Write the file."""
    found = {}
    for version, wheel in WHEELS.items():
        with tempfile.TemporaryDirectory() as folder:
            found[version] = {"wheel": wheel, "names": signatures(wheel, Path(folder))}
    lines = (
        f"{json.dumps(version)}: {json.dumps(value, separators=(', ', ': '))}"
        for version, value in found.items()
    )
    TARGET.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"wrote {TARGET}")


if __name__ == "__main__":
    main()
