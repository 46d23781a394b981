"""Lists of files, with class names, numbers or masks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ospq_export.data import ClassChoice, DataConfig, ImageSet, image_set, open_source
from ospq_export.data.found import Found
from ospq_export.errors import InputError

CONFIG = DataConfig(
    input_size=(1, 12, 12), mean=(0,), std=(1,), interpolation="nearest", crop_pct=0.75, crop_mode="center"
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a/10.png", "a/9.png", "b/x, y.png", "é.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (16, 16)).save(tmp_path / name)
    return tmp_path


def read(root: Path, text: str | bytes, name: str = "list.csv") -> Found:
    (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    found = open_source(root / name)
    assert isinstance(found, Found)
    return found


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.csv", 'a/10.png,dog\na/9.png,cat\n"b/x, y.png",dog\n'),
        ("x.csv", '\ufeffPath,Label\r\n./a/10.png, dog\r\na/9.png,cat\r\n"b/x, y.png",dog\r\n\r\n'),
        ("x.tsv", "a/10.png\tdog\na/9.png\tcat\nb/x, y.png\tdog"),
        ("x.TXT", "a/10.png\tdog\na/9.png\tcat\nb/x, y.png\tdog"),
        ("x.txt", 'path,label\na/10.png,dog\n\na/9.png,cat\n"b/x, y.png",dog'),
    ],
)
def test_forms_of_a_list(root: Path, name: str, text: str) -> None:
    found = read(root, text, name)
    assert list(found.ids) == ["a/9.png", "a/10.png", "b/x, y.png"]
    assert list(found.names) == ["cat", "dog"]
    assert found.labels.codes is not None and found.labels.codes.tolist() == [0, 1, 1]


def test_paths_alone_and_paths_from_elsewhere(root: Path) -> None:
    found = read(root, f"é.png\n{root / 'a/9.png'}\n", "x.txt")
    assert list(found.ids) == sorted([str(root / "a/9.png"), "é.png"]) and found.labels.codes is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "this list names no image"),
        ("path,label\n", "this list names no image"),
        ("a/9.png,cat,1\n", "line 1 is no path with a label: a/9.png,cat,1"),
        ("a/9.png,cat\n,cat\n", "line 2 is no path with a label: ,cat"),
        ("a/9.png,cat\na/10.png,\n", "1 of 2 images have no label"),
        ("a/9.png,cat\na/10.png\n", "1 of 2 images have no label"),
        ("a/9.png,-2\n", "the label -2 of 1 images is no class"),
        ("a/9.png,1\na/9.png,1\n", "1 images have another's name: a/9.png"),
        ("a/9.png\na/8.png\na/7.png\n", "2 of 3 files are not there: a/7.png, a/8.png"),
        ("a\n", "1 of 1 files are not there: a"),
        (b"\xff\xfe", "not UTF-8"),
        ("path,mask\na/9.png,a/10.png\na/10.png,\n", "an image has no mask"),
        ("path,mask\na/9.png,a/11.png\n", "1 of 1 files are not there: a/11.png"),
    ],
)
def test_refused_in_one_line(root: Path, text: str | bytes, expected: str) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        read(root, text)
    assert "\n" not in str(caught.value) and "list.csv" in str(caught.value)


# Masks


def masked(root: Path, config: DataConfig, picture: Image.Image, mask: Image.Image) -> ImageSet:
    picture.save(root / "p.png")
    mask.save(root / "m.png")
    found = image_set(read(root, "path,mask\np.png,m.png\n"), config, ClassChoice(), 30)
    assert isinstance(found, ImageSet)
    return found


@pytest.mark.parametrize("mode", ["L", "P"])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(40, 24), (24, 40), (16, 16)])
def test_masks_go_the_way_of_their_images(
    root: Path, mode: str, crop_mode: str, size: tuple[int, int]
) -> None:
    """The mask's numbers as an image, through the transform of nearest pixels: the same numbers come out."""
    values = np.random.default_rng(0).integers(0, 255, size[::-1], dtype=np.uint8)
    mask = Image.fromarray(values)
    if mode == "P":
        mask.putpalette(np.arange(768, dtype=np.uint8)[::-1].tobytes())
    config = CONFIG.model_copy(update={"crop_mode": crop_mode})
    batch = next(masked(root, config, Image.fromarray(values), mask).batches(4))
    assert (batch.labels.dtype, tuple(batch.labels.shape)) == (torch.int64, (1, 12, 12))
    expected = (batch.images[:, 0] * 255).round().long()
    inside = batch.labels >= 0
    assert torch.equal(batch.labels[inside], expected[inside])
    assert bool(inside.all()) or (crop_mode == "border" and size != (16, 16))


def test_ignored_pixels_and_batches_with_workers(root: Path) -> None:
    values = np.full((16, 16), 7, np.uint8)
    values[4:8] = 255
    images = masked(root, CONFIG, Image.new("L", (16, 16)), Image.fromarray(values))
    here, there = next(images.batches(1)), next(images.batches(1, workers=1))
    assert here.labels[0, :, 0].tolist() == [7] * 2 + [-1] * 4 + [7] * 6
    assert torch.equal(here.labels, there.labels)
    assert torch.equal(images.sample(1, 0).labels, here.labels)


def test_masks_that_do_not_fit_are_skipped_and_named(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    for mask, reason in (
        (Image.new("L", (8, 8)), "its mask has 8x8 pixels, the image 16x16"),
        (Image.new("RGB", (16, 16)), "its mask has mode RGB"),
    ):
        images = masked(root, CONFIG, Image.new("L", (16, 16)), mask)
        with pytest.raises(InputError, match="none of 1 images"):
            list(images.batches(1))
        assert images.skipped == ["p.png"] and reason in caplog.text
