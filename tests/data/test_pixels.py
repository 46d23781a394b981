"""Deep pixels, orientation, transparency and frames, against arithmetic by hand."""

import logging
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from ospq_export.data import DataConfig, ImageSet
from ospq_export.data import pixels as said
from ospq_export.data.pixels import read_picture

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
ORIENTATION = 0x0112


def read(path: Path, mode: str = "L", exif: bool = False) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    picture, notes = read_picture(path, mode, exif=exif)
    assert picture.mode == mode
    return np.asarray(picture), notes


def png(path: Path, pixels: NDArray[np.uint16], kind: int) -> Path:
    """A PNG of 16 bits per channel; Pillow cannot write those with colours."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


@pytest.mark.parametrize("ending", ["png", "tiff", "pgm"])
def test_sixteen_bits_are_scaled_exactly(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"x.{ending}"
    Image.fromarray(GREY.astype(np.uint16) * 257).save(path)
    pixels, notes = read(path)
    assert (pixels == GREY).all()
    assert (read(path, "RGB")[0] == GREY[..., None]).all()
    assert list(notes) == ([] if ending == "pgm" else [said.container_range(65535)])


def test_values_between_are_rounded(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (32, 32)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    assert (read(tmp_path / "x.png")[0] == np.rint(values / 257)).all()


@pytest.mark.parametrize(("kind", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_per_channel(tmp_path: Path, kind: int, channels: int) -> None:
    pixels = np.repeat(GREY[..., None].astype(np.uint16) * 257, channels, 2)
    pixels[..., 3 if channels == 4 else 1 if channels == 2 else 3 :] = 65535
    read_pixels, notes = read(png(tmp_path / "x.png", pixels, kind), "RGB")
    assert (read_pixels == GREY[..., None]).all()
    assert notes == (said.HIGH_BYTE,)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("white_is_zero", [False, True])
def test_tiff_of_sixteen_bits(tmp_path: Path, order: str, white_is_zero: bool) -> None:
    values = GREY.astype(np.uint16) * 257
    stored = 65535 - values if white_is_zero else values
    tags = [
        (256, 16),
        (257, 16),
        (258, 16),
        (259, 1),
        (262, 0 if white_is_zero else 1),
        (273, 8 + 2 + 96 + 4),
    ]
    tags += [(278, 16), (279, 512)]
    entries = b"".join(struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    path = tmp_path / "x.tif"
    path.write_bytes(head + entries + bytes(4) + stored.astype(f"{order}u2").tobytes())
    if order == ">" and white_is_zero:
        pytest.skip("Pillow does not read this")
    assert (read(path)[0] == GREY).all()


@pytest.mark.parametrize(
    ("values", "top", "kind"),
    [
        (GREY.astype(np.int32) * 257, 65535, "I"),
        (GREY.astype(np.int32), 255, "I"),
        (GREY.astype(np.float32) * 257, 65535, "F"),
        (GREY.astype(np.float32), 255, "F"),
        (GREY.astype(np.float32) / 255, 1, "F"),
    ],
)
def test_ranges_that_nothing_tells_are_assumed_and_said(
    tmp_path: Path, values: NDArray[np.float32], top: int, kind: str
) -> None:
    Image.fromarray(values).save(tmp_path / "x.tiff")
    pixels, notes = read(tmp_path / "x.tiff")
    assert (pixels == GREY).all()
    assert notes == (said.assumed_range(kind, top),)


@pytest.mark.parametrize(
    "values",
    [
        GREY.astype(np.int32) * 1000,
        GREY.astype(np.int32) - 1,
        GREY.astype(np.float32) * 1000,
        GREY.astype(np.float32) - 100,
        np.full((16, 16), np.nan, np.float32),
        np.full((16, 16), np.inf, np.float32),
    ],
)
def test_ranges_that_cannot_be_known_are_refused(tmp_path: Path, values: NDArray[np.float32]) -> None:
    Image.fromarray(values).save(tmp_path / "x.tiff")
    with pytest.raises(ValueError, match="cannot be known"):
        read(tmp_path / "x.tiff")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"])
@pytest.mark.parametrize("target", ["L", "RGB"])
def test_every_mode_becomes_eight_bits(tmp_path: Path, mode: str, target: str) -> None:
    from ospq_export.data.pixels import _convert

    rgb = Image.fromarray(np.repeat(GREY[..., None], 3, 2))
    source = Image.new("LAB", (16, 16)) if mode == "LAB" else rgb.convert("LA" if mode == "PA" else mode)
    source = source.convert("PA") if mode == "PA" else source
    source = Image.fromarray(GREY).convert("P") if mode == "P" else source
    image = _convert(source, target)
    assert image.mode == target
    if mode not in ("1", "LAB"):
        off = np.abs(np.asarray(image).reshape(16, 16, -1).astype(int) - GREY[..., None]).max()
        assert off <= 2


def oriented(path: Path, pixels: NDArray[np.uint8], orientation: int) -> Path:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(pixels).save(path, exif=exif)
    return path


TURNS = {
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: np.swapaxes(a, 0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(np.swapaxes(a, 0, 1), 2),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("deep", [False, True])
def test_orientation(tmp_path: Path, orientation: int, deep: bool) -> None:
    stored = GREY[:8].astype(np.uint16) * 257 if deep else GREY[:8]
    path = oriented(tmp_path / "x.png", stored, orientation)
    pixels, notes = read(path)
    assert (pixels == GREY[:8]).all() and said.ORIENTATION_IGNORED in notes
    pixels, notes = read(path, exif=True)
    assert np.array_equal(pixels, TURNS[orientation](GREY[:8])) and said.ORIENTATION_APPLIED in notes


def test_pictures_that_are_upright(tmp_path: Path) -> None:
    for exif in (False, True):
        assert read(oriented(tmp_path / "x.png", GREY, 1), exif=exif)[1] == ()
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[ORIENTATION] = 6
    Image.fromarray(GREY[:8]).save(tmp_path / "x.tiff", tiffinfo=info)
    for exif in (False, True):
        # Pillow turns a TIFF by itself, for timm as well.
        pixels, notes = read(tmp_path / "x.tiff", exif=exif)
        assert np.array_equal(pixels, TURNS[6](GREY[:8])) and notes == ()


def test_transparency_and_frames(tmp_path: Path) -> None:
    rgba = np.repeat(GREY[..., None], 4, 2)
    Image.fromarray(rgba).save(tmp_path / "clear.png")
    rgba[..., 3] = 255
    Image.fromarray(rgba).save(tmp_path / "opaque.png")
    frames = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    for name in ("x.gif", "x.tiff"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        pixels, notes = read(tmp_path / name)
        assert (pixels == GREY).all() and notes == (said.FRAMES,)
    assert read(tmp_path / "clear.png")[1] == (said.ALPHA,)
    assert read(tmp_path / "opaque.png")[1] == ()


CONFIG = DataConfig(
    input_size=(1, 16, 16), mean=(0,), std=(1,), interpolation="nearest", crop_pct=1, crop_mode="center"
)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_was_noted_is_counted_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    (tmp_path / "a").mkdir()
    for place in range(6):
        oriented(tmp_path / f"a/{place}.png", GREY, 6 if place % 2 else 1)
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / "a/deep.png")
    images = ImageSet.from_folder(tmp_path, CONFIG)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            list(images.batches(3, workers=workers))
    assert images.record.notes == {said.ORIENTATION_IGNORED: 3, said.container_range(65535): 1}
    assert caplog.text.count("3 images have an EXIF orientation") == 1
    turned = ImageSet.from_folder(tmp_path, CONFIG.model_copy(update={"exif": True}))
    pixels = torch.cat([batch.images for batch in turned.batches(7)])[:, 0] * 255
    assert np.array_equal(pixels[1].round().numpy(), TURNS[6](GREY))
    assert np.array_equal(pixels[0].round().numpy(), GREY)


def test_narrow_values_are_said_of_whole_sets_only(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.fromarray(GREY.astype(np.uint16) * 16).save(tmp_path / "a/1.png")
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / "a/2.png")
    images = ImageSet.from_folder(tmp_path, CONFIG)
    list(images.batches(1, [0]))
    assert said.NARROW in images.record.notes
    list(images.batches(1))
    assert said.NARROW not in images.record.notes
