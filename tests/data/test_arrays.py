"""Arrays in files: what is taken, and what is refused in one line."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ospq_export.data import open_source
from ospq_export.data.arrays import MappedSource
from ospq_export.data.found import Found
from ospq_export.errors import InputError

IMAGES = np.zeros((3, 8, 8), np.uint8)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (IMAGES.astype(np.float32), r"images are uint8 \(N, H, W\[, 3\]\), not float32 \(3, 8, 8\)"),
        (IMAGES[0], r"not uint8 \(8, 8\)"),
        (np.zeros((3, 3, 8, 8), np.uint8), r"not uint8 \(3, 3, 8, 8\)"),
        (IMAGES[:0], "cannot read arrays|no images"),
        (np.array([None]), "cannot read arrays"),
    ],
)
def test_refused_npy(tmp_path: Path, array: Any, expected: str) -> None:
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(InputError, match=expected) as caught:
        open_source(tmp_path / "x.npy")
    assert "\n" not in str(caught.value) and "x.npy" in str(caught.value)


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"x": IMAGES}, "no array `images`"),
        ({"images": IMAGES, "labels": np.arange(2)}, r"3 images and `labels` of shape \(2,\)"),
        ({"images": IMAGES, "labels": np.zeros((3, 2), int)}, r"3 images and `labels` of shape \(3, 2\)"),
        ({"images": IMAGES, "labels": np.array([0, 1, -2])}, "the label -2 of 1 images is no class"),
        ({"images": IMAGES, "labels": np.array([0.0, 1, 2])}, r"the label '0\.0' is no class"),
        ({"images": IMAGES, "labels": np.array(["a", "", "b"])}, "1 of 3 images have no label"),
        ({"images": IMAGES, "ids": np.array(["a", "b", "a"])}, "1 images have another's name: a"),
        ({"images": IMAGES, "labels": np.array([None] * 3)}, "cannot read arrays"),
    ],
)
def test_refused_npz(tmp_path: Path, arrays: dict[str, Any], expected: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(InputError, match=expected) as caught:
        open_source(tmp_path / "x.npz")
    assert "\n" not in str(caught.value) and "x.npz" in str(caught.value)


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_damaged_files(tmp_path: Path, name: str) -> None:
    for content in (b"", b"nonsense", b"PK\x03\x04nonsense"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="cannot read arrays"):
            open_source(tmp_path / name)
    np.save(tmp_path / "y.npy", np.zeros((9, 8, 8), np.uint8))
    (tmp_path / "x.npy").write_bytes((tmp_path / "y.npy").read_bytes()[:300])
    with pytest.raises(InputError, match="cannot read arrays"):
        open_source(tmp_path / "x.npy")


def changed(content: bytes, place: int, values: bytes) -> bytes:
    """The content with other bytes at a place; negative ones count from the end."""
    found = bytearray(content)
    found[place : place + len(values)] = values
    return bytes(found)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_whatever_a_damaged_archive_raises_is_one_line(tmp_path: Path, save: Any) -> None:
    path = tmp_path / "x.npz"
    save(path, images=np.random.default_rng(0).integers(0, 9, (9, 8, 8, 3), np.uint8))
    whole = path.read_bytes()
    entry = whole.index(b"PK\x01\x02")  # of the directory: versions, flags, method
    for content in (
        changed(whole, entry + 6, b"\xff"),
        changed(whole, entry + 8, b"\x01"),
        changed(whole, entry + 10, b"\x63"),
        changed(whole, 200, bytes(range(200))),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match="cannot read arrays") as caught:
            open_source(path)
        assert "\n" not in str(caught.value)


def test_an_npy_stays_on_the_disk(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(3 * 64, dtype=np.uint8).reshape(3, 8, 8))
    found = open_source(tmp_path / "x.npy")
    assert isinstance(found, Found)
    source = found.source(np.zeros(3, np.int64))
    assert isinstance(source, MappedSource)
    picture, notes = source.decode(2, "RGB", False)
    assert np.asarray(picture)[:, :, 1].ravel().tolist() == list(range(128, 192)) and notes == ()
