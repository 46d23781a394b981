"""The documents, read as text: their pages, and the fenced blocks of a page; tests run these as a reader would."""

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ospq_export import cli

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
_BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```', re.DOTALL | re.MULTILINE)
_DEFAULT = re.compile(r"\$\{\w+:-([^}]*)\}")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file that it is to be saved as, or "", and its text."""

    language: str
    title: str
    text: str

    def lines(self) -> list[str]:
        """Commands of a shell, those over several lines joined, without comments."""
        joined = self.text.replace("\\\n", " ").splitlines()
        return [line for line in joined if line.strip() and not line.lstrip().startswith("#")]


def blocks(page: Path) -> list[Block]:
    """All blocks of a page, in order."""
    return [Block(*found) for found in _BLOCK.findall(page.read_text(encoding="utf-8"))]


def headings(text: str) -> list[str]:
    """Headings of a page without those of its blocks, as links name them."""
    found = re.findall(r"^#{1,6} (.+)$", _BLOCK.sub("", text), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", heading) for heading in found]
    return [re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", h).strip().lower()) for h in plain]


def commands(line: str) -> list[list[str]]:
    """The arguments behind each call of our command line, with the defaults of a script's parameters in their place."""
    found = []
    for part in _DEFAULT.sub(r"\1", line).split(" | "):
        words = shlex.split(part, comments=True)
        starts = [
            i for i, word in enumerate(words) if re.fullmatch(r"ospq-export(:gpu)?|ospq_export\.cli", word)
        ]
        if starts and words[0] not in ("pip", "cd") and words[:2] != ["docker", "build"]:
            found.append(words[starts[-1] + 1 :])
    return found


def run_line(line: str) -> int:
    """Run a line of a shell block; our own command line in this process, to spare its imports. The exit status."""
    words = shlex.split(line, comments=True)
    if words[0] != "ospq-export":
        return subprocess.run(["bash", "-euc", line], check=False).returncode
    before, sys.argv = sys.argv, words
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0
