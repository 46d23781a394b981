"""How long the package takes to answer: import, --help, and lint of a small file, beside an empty Python process.

    python benchmarks/startup.py

Every figure is the median of several whole processes, taken in turns.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lib.rows import make_parser, origin, table

from ospq_export.engines.doctor import tiny_model

CLI = "from ospq_export.cli import main; main()"


def seconds(arguments: list[str]) -> float:
    """Wall time of one process."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    """Command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--turns", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tiny.onnx"
        file.write_bytes(tiny_model())
        cases = {
            "an empty process": ["-c", "pass"],
            "import ospq_export": ["-c", "import ospq_export"],
            "--help": ["-c", CLI, "--help"],
            "lint of a small file": ["-c", CLI, "lint", str(file)],
        }
        found: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(args.turns):
            for name, arguments in cases.items():
                found[name].append(seconds(arguments))
    medians = {name: statistics.median(values) for name, values in found.items()}
    empty = medians["an empty process"]
    rows = [[name, f"{value:.2f}", f"{value / empty:.1f}"] for name, value in medians.items()]
    sys.stdout.write(f"{origin()['machine']}\n\n{table(['process', 'seconds', 'over an empty one'], rows)}")


if __name__ == "__main__":
    main()
