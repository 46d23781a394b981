"""What a file is that was given as a checkpoint and is none: a pointer, a page, an archive, another framework's format."""

from __future__ import annotations

import json
import re
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

_AGAIN = "download it again"
_UNPACK = "unpack it, and give the file of weights inside"
_SAVE = "load it where it was made, and save model.state_dict() with torch.save or safetensors"
_HEAD = 4096
_LARGEST_HEADER = 100_000_000  # safetensors' own limit


@dataclass(frozen=True)
class Foreign:
    """What a file is, as "it is ..." goes on, and what to do."""

    what: str
    fix: str


# At which byte what stands.
_MAGIC: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"\x1f\x8b", "a gzip archive", _UNPACK),
    (0, b"BZh", "a bzip2 archive", _UNPACK),
    (0, b"\xfd7zXZ\x00", "an xz archive", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "a zstandard archive", _UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-zip archive", _UNPACK),
    (0, b"Rar!", "a RAR archive", _UNPACK),
    (0, b"GGUF", "a GGUF file, whose weights are quantized for llama.cpp", "give the original weights"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras)", "give weights of timm's PyTorch model"),
    (0, b"\x93NUMPY", "a NumPy array", _SAVE),
    (0, b"%PDF", "a PDF document", _AGAIN),
    (0, b"\x89PNG", "an image", "give the file of weights"),
    (0, b"\xff\xd8\xff", "an image", "give the file of weights"),
    (0, b"\x7fELF", "a program", "give the file of weights"),
    (257, b"ustar", "a tar archive", _UNPACK),
    (4, b"TFL3", "a TensorFlow Lite model", "give weights of timm's PyTorch model"),
)


def foreign_file(path: Path) -> Foreign | None:
    """What a file is, by its content; None where it may be a torch or safetensors checkpoint.

    Raises:
        OSError: it cannot be read.
    """
    if path.is_dir():
        return _folder(path)
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if not head:
        return Foreign("an empty file", _AGAIN)
    for at, magic, what, fix in _MAGIC:
        if head.startswith(magic, at):
            return Foreign(what, fix)
    if head.startswith(b"PK"):
        return _archive(path)
    if is_safetensors(path):
        return _cut_short(path, head)
    return _text(path, head) or _onnx(path, head)


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do: the length of a JSON header, and the header."""
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and struct.unpack("<Q", head[:8])[0] <= _LARGEST_HEADER


def _cut_short(path: Path, head: bytes) -> Foreign | None:
    length = struct.unpack("<Q", head[:8])[0]
    size = path.stat().st_size
    wanted = 8 + length
    if wanted <= size:
        try:
            with path.open("rb") as file:
                header = json.loads(file.read(wanted)[8:])
            ends = [t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return Foreign("a safetensors file with a damaged header", _AGAIN)
        wanted += max(ends, default=0)
    if wanted > size:
        return Foreign(f"cut short: {size} of {wanted} bytes", _AGAIN)
    return None


def _folder(path: Path) -> Foreign:
    names = {child.name for child in path.iterdir()}
    if any(name.endswith(".distcp") for name in names):
        fix = "join its shards with torch.distributed.checkpoint.format_utils.dcp_to_torch_save"
        return Foreign("a folder of distributed shards", fix)
    if "zero_to_fp32.py" in names or any("zero_pp_rank" in name for name in names):
        return Foreign("a folder of DeepSpeed shards", "join them with DeepSpeed's zero_to_fp32.py")
    files = sorted(n for n in names if n.endswith((".safetensors", ".bin", ".pth", ".pt", ".ckpt")))
    fix = f"give a file in it: {', '.join(files[:3])}" if files else "give the file of weights"
    return Foreign("a folder (Is a directory)", fix)


def _archive(path: Path) -> Foreign | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:
        # A damaged archive raises whatever its damage leads to, UnicodeDecodeError and NotImplementedError among them.
        return Foreign("a torch file or zip archive that is cut short or damaged", _AGAIN)
    ends = [name.rsplit("/", 1)[-1] for name in names]
    if "constants.pkl" in ends and any("/code/" in f"/{name}" for name in names):
        fix = "save torch.jit.load(FILE).state_dict() with torch.save, and give that"
        return Foreign("a TorchScript archive", fix)
    if "archive_format" in ends or "serialized_exported_program.json" in ends:
        fix = "save torch.export.load(FILE).state_dict with torch.save, and give that"
        return Foreign("a program of torch.export", fix)
    if "data.pkl" in ends:
        return None
    if names and all(name.endswith(".npy") for name in names):
        return Foreign("a NumPy archive (.npz: JAX weights)", "give weights of timm's PyTorch model")
    shown = ", ".join(names[:3]) or "nothing"
    return Foreign(f"a zip archive of something else ({shown})", _UNPACK)


def _text(path: Path, head: bytes) -> Foreign | None:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith((b"version https://git-lfs", b"version https://hawser")):
        return Foreign("a Git LFS pointer, not the weights themselves", "run 'git lfs pull' where it lies")
    if b"/annex/objects/" in start:
        return Foreign("a git-annex pointer, not the weights themselves", "run 'git annex get' on it")
    if start.startswith((b"<!doctype html", b"<html", b"<head")) or b"<html" in start[:1000]:
        title = re.search(rb"<title>\s*([^<]{1,60})", head, re.IGNORECASE)
        named = f" ({' '.join(title[1].decode(errors='replace').split())})" if title else ""
        return Foreign(
            f"an HTML page{named}, not weights", f"{_AGAIN}: from the link of the file, not of its page"
        )
    if start.startswith(b"<?xml"):
        return Foreign("an XML document, perhaps a server's error message", _AGAIN)
    if start.startswith((b"{", b"[")):
        return _json(path)
    return None


def _json(path: Path) -> Foreign | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    if isinstance(content, dict) and isinstance(content.get("weight_map"), dict):
        files = sorted({str(name) for name in content["weight_map"].values()})
        fix = "join the files into one: read each with safetensors.torch.load_file, and save all tensors together"
        return Foreign(f"an index of weights in {len(files)} files ({', '.join(files[:3])})", fix)
    return Foreign("a JSON text, not weights", _AGAIN)


def _onnx(path: Path, head: bytes) -> Foreign | None:
    """ONNX has no magic number: a model begins with its IR version, then a string field."""
    protobuf = (
        len(head) > 2 and head[0] == 0x08 and head[1] < 0x20 and head[2] in b"\x12\x1a\x22\x2a\x32\x3a\x42"
    )
    if path.suffix.lower() == ".onnx" or protobuf:
        return Foreign("an ONNX model", "give the weights that it was exported from")
    return None
