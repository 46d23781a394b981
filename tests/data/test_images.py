"""Preprocessing and image sets, against PIL and numpy by hand."""

import logging
import os
import struct
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from ospq_export.data import ClassChoice, DataConfig, ImageSet
from ospq_export.errors import InputError

CONFIG = DataConfig(
    input_size=(3, 24, 24),
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.25, 0.5),
    interpolation="bicubic",
    crop_pct=0.75,
    crop_mode="center",
)


def picture(seed: int, size: tuple[int, int] = (40, 40)) -> Image.Image:
    """A smooth random picture, (width, height), so that JPEG keeps it about as it is."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def by_hand(image: Image.Image, config: DataConfig) -> NDArray[np.float32]:
    """Shorter side to size / crop_pct, centre crop, scale and normalise: (C, H, W)."""
    _, height, width = config.input_size
    side = int(height / config.crop_pct)
    short = min(image.size)
    size = tuple(side if edge == short else int(side * edge / short) for edge in image.size)
    image = image.resize(size, Image.Resampling[config.interpolation.upper()])
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), np.float32) / 255
    pixels = pixels.reshape(height, width, -1)
    return ((pixels - np.float32(config.mean)) / np.float32(config.std)).transpose(2, 0, 1)


def write_tree(root: Path, names: list[str]) -> list[str]:
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(root / name)
    return names


def damage(path: Path) -> None:
    """Cuts the file's end off: PIL opens it, and fails only when the pixels are read."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 4 // 5])
    Image.open(path)


def everything(images: ImageSet, **kwargs: Any) -> tuple[torch.Tensor, list[int], list[str]]:
    batches = list(images.batches(3, **kwargs))
    return (
        torch.cat([batch.images for batch in batches]),
        torch.cat([batch.labels for batch in batches]).tolist(),
        [name for batch in batches for name in batch.ids],
    )


# Images from folders


def test_pixels_labels_and_names(tmp_path: Path) -> None:
    names = write_tree(tmp_path, ["cat/10.png", "cat/9.png", "dog/a b.JPEG", "emu/x.jpg"])
    images = ImageSet.from_folder(tmp_path, CONFIG)
    pixels, labels, ids = everything(images)
    assert ids == ["cat/9.png", "cat/10.png", "dog/a b.JPEG", "emu/x.jpg"]
    assert labels == [0, 0, 1, 2]
    assert images.class_to_idx == {"cat": 0, "dog": 1, "emu": 2}
    assert len(images) == len(names)
    assert images.skipped == []
    assert pixels.dtype == torch.float32
    for place, name in enumerate(ids):
        expected = by_hand(Image.open(tmp_path / name).convert("RGB"), CONFIG)
        np.testing.assert_allclose(pixels[place].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("size", [(60, 40), (33, 77)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
def test_pixels_of_oblong_pictures(
    tmp_path: Path, size: tuple[int, int], channels: int, interpolation: str
) -> None:
    picture(7, size).save(tmp_path / "a.png")
    changes = {
        "input_size": (channels, 24, 24),
        "mean": CONFIG.mean[:channels],
        "std": CONFIG.std[:channels],
        "interpolation": interpolation,
    }
    config = DataConfig.model_validate({**CONFIG.model_dump(), **changes})
    pixels = everything(ImageSet.from_folder(tmp_path, config))[0]
    expected = by_hand(Image.open(tmp_path / "a.png").convert("L" if channels == 1 else "RGB"), config)
    np.testing.assert_allclose(pixels[0].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("crop_mode", ["squash", "border"])
@pytest.mark.parametrize("channels", [1, 3])
def test_other_crop_modes_give_the_right_shape(tmp_path: Path, crop_mode: str, channels: int) -> None:
    picture(7, (60, 30)).save(tmp_path / "a.png")
    changes = {"input_size": (channels, 24, 20), "mean": (0.5,) * channels, "std": (0.5,) * channels}
    config = DataConfig.model_validate({**CONFIG.model_dump(), **changes, "crop_mode": crop_mode})
    pixels = everything(ImageSet.from_folder(tmp_path, config))[0]
    assert pixels.shape == (1, channels, 24, 20)
    assert pixels.isfinite().all()


def test_odd_image_modes(tmp_path: Path) -> None:
    expected = picture(1).convert("P")
    expected.save(tmp_path / "palette.png")
    picture(1).convert("L").save(tmp_path / "grey.png")
    picture(1).convert("RGBA").save(tmp_path / "alpha.png")
    picture(1).convert("CMYK").save(tmp_path / "print.jpg")
    assert everything(ImageSet.from_folder(tmp_path, CONFIG))[0].shape == (4, 3, 24, 24)


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    write_tree(tmp_path, ["b.png", "a.png"])
    for classes in (None, {"cat": 0}):
        images = ImageSet.from_folder(tmp_path, CONFIG, classes)
        assert images.class_to_idx == {}
        assert everything(images)[1:] == ([-1, -1], ["a.png", "b.png"])


def test_classes_of_an_earlier_run(tmp_path: Path) -> None:
    write_tree(tmp_path, ["dog/a.png", "emu/b.png"])
    classes = {"ant": 0, "cat": 1, "dog": 2, "emu": 3}
    images = ImageSet.from_folder(tmp_path, CONFIG, classes)
    assert everything(images)[1] == [2, 3]
    assert images.class_to_idx == classes
    with pytest.raises(InputError, match=r"1 class folders are not among the run's 1 classes .*emu"):
        ImageSet.from_folder(tmp_path, CONFIG, {"dog": 0})


@pytest.mark.parametrize(
    ("order", "expected"), [("natural", ["1", "9", "10", "b"]), ("plain", ["1", "10", "9", "b"])]
)
def test_classes_are_ordered_as_asked(tmp_path: Path, order: Any, expected: list[str]) -> None:
    write_tree(tmp_path, [f"{name}/x.png" for name in ("10", "9", "1", "b")])
    images = ImageSet.from_folder(tmp_path, CONFIG, choice=ClassChoice(order=order))
    assert list(images.class_to_idx) == expected
    _, labels, ids = everything(images)
    assert [expected[label] for label in labels] == [name.split("/")[0] for name in ids]
    assert images.record.classes_source == f"class_order={order}"
    with pytest.raises(InputError, match="`class_order`"):
        ImageSet.from_folder(tmp_path, CONFIG)


def test_a_class_without_a_readable_format_keeps_its_number(tmp_path: Path) -> None:
    write_tree(tmp_path, ["a/1.png", "b/2.webp", "d/3.png"])
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x.heic").touch()
    images = ImageSet.from_folder(tmp_path, CONFIG)
    assert everything(images)[1] == [0, 1, 3]
    assert images.record.passed_over == {".heic": 1}


def test_images_beside_class_folders_are_refused(tmp_path: Path) -> None:
    write_tree(tmp_path, ["cat/a.png", "stray.png"])
    with pytest.raises(InputError, match="both in class folders and beside them"):
        ImageSet.from_folder(tmp_path, CONFIG)


def test_missing_empty_and_wrong_folders(tmp_path: Path) -> None:
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("no image")
    for name, expected in (
        ("missing", "No such file"),
        ("notes.txt", "Not a directory"),
        ("empty", "no images"),
        (".", "no images"),
    ):
        with pytest.raises(InputError, match=expected) as caught:
            ImageSet.from_folder(tmp_path / name, CONFIG)
        assert str(tmp_path) in str(caught.value)


@pytest.fixture
def locked_tree() -> Iterator[Path]:
    """A folder with classes cat and dog, as seen by a user who may not read what has no permissions."""
    with tempfile.TemporaryDirectory() as name:
        # pytest's own folders are closed to other users, and nothing is closed to root.
        Path(name).chmod(0o755)
        write_tree(Path(name), ["data/cat/a.png", "data/dog/b.png"])
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            yield Path(name)
        finally:
            os.seteuid(user)
            for path in ("data", "data/cat", "data/cat/a.png"):
                (Path(name) / path).chmod(0o755)


def lock(path: Path) -> None:
    user = os.geteuid()
    os.seteuid(os.getuid())
    path.chmod(0)
    os.seteuid(user)


@pytest.mark.parametrize("name", ["data", "data/cat"])
def test_folder_without_permission(locked_tree: Path, name: str) -> None:
    assert len(ImageSet.from_folder(locked_tree / "data", CONFIG)) == 2
    lock(locked_tree / name)
    with pytest.raises(InputError, match="Permission denied") as caught:
        ImageSet.from_folder(locked_tree / "data", CONFIG)
    assert f"({locked_tree / name})" in str(caught.value)


def test_file_without_permission_is_skipped(locked_tree: Path) -> None:
    lock(locked_tree / "data/cat/a.png")
    images = ImageSet.from_folder(locked_tree / "data", CONFIG)
    assert everything(images)[2] == ["dog/b.png"]
    assert images.skipped == ["cat/a.png"]


def lying_png() -> bytes:
    """A PNG whose header is sound and whose pixel data is not."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40, 40, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"nonsense") + chunk(b"IEND", b"")


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images_are_skipped_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    write_tree(tmp_path, [f"cat/{number}.jpg" for number in range(6)] + ["dog/6.jpg"])
    damage(tmp_path / "cat/1.jpg")
    (tmp_path / "cat/2.jpg").write_text("an image by its name only")
    (tmp_path / "cat/4.jpg").write_bytes(b"")
    (tmp_path / "dog/5.png").write_bytes(lying_png())
    images = ImageSet.from_folder(tmp_path, CONFIG)
    with caplog.at_level(logging.WARNING, "ospq_export"):
        first = [batch.ids for batch in images.batches(3, workers=workers)]
    broken = ["cat/1.jpg", "cat/2.jpg", "cat/4.jpg", "dog/5.png"]
    assert first == [["cat/0.jpg", "cat/3.jpg", "cat/5.jpg"], ["dog/6.jpg"]]
    assert images.skipped == broken
    assert [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()] == [
        record.getMessage() for record in caplog.records
    ]
    assert all(name in caplog.text for name in broken)
    list(images.batches(2))
    assert images.skipped == broken


def test_all_images_damaged_is_an_error(tmp_path: Path) -> None:
    write_tree(tmp_path, ["a/0.jpg", "a/1.jpg", "b/2.jpg"])
    for name in ("a/0.jpg", "a/1.jpg"):
        damage(tmp_path / name)
    images = ImageSet.from_folder(tmp_path, CONFIG)
    with pytest.raises(InputError, match=r"none of 2 images can be read .*a/0\.jpg"):
        list(images.batches(4, indices=[0, 1]))
    damage(tmp_path / "b/2.jpg")
    for use in (lambda: list(images.batches(2)), lambda: images.sample(1, 0)):
        with pytest.raises(InputError, match="none of 3 images can be read"):
            use()
    assert sorted(images.skipped) == ["a/0.jpg", "a/1.jpg", "b/2.jpg"]


def test_images_that_vanish_after_the_folder_was_read(tmp_path: Path) -> None:
    write_tree(tmp_path, ["a/0.png", "a/1.png"])
    images = ImageSet.from_folder(tmp_path, CONFIG)
    (tmp_path / "a/0.png").unlink()
    assert everything(images)[2] == ["a/1.png"]
    assert images.skipped == ["a/0.png"]


# Batches and samples


@pytest.fixture
def numbers() -> ImageSet:
    """A hundred one-colour images, each of the value of its place."""
    values = np.arange(100, dtype=np.uint8)
    config = DataConfig(
        input_size=(1, 8, 8), mean=(0,), std=(1,), interpolation="nearest", crop_pct=1, crop_mode="center"
    )
    return ImageSet.from_arrays(
        np.broadcast_to(values[:, None, None], (100, 8, 8)).copy(),
        values.astype(np.int64) % 10,
        [f"n{value}" for value in values],
        config,
        [f"class{number}" for number in range(10)],
    )


def test_batches_keep_the_order_asked_for(numbers: ImageSet) -> None:
    order = [5, 99, 0, 5, 42]
    batches = list(numbers.batches(2, order))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    values = torch.cat([batch.images for batch in batches])[:, 0, 3, 3] * 255
    assert values.round().int().tolist() == order
    assert torch.cat([batch.labels for batch in batches]).tolist() == [5, 9, 0, 5, 2]
    assert [name for batch in batches for name in batch.ids] == ["n5", "n99", "n0", "n5", "n42"]
    assert list(numbers.batches(2, [])) == []


def test_workers_change_nothing_and_draw_no_random_numbers(numbers: ImageSet) -> None:
    state = torch.get_rng_state()
    alone, together = everything(numbers), everything(numbers, workers=2)
    assert torch.equal(alone[0], together[0])
    assert alone[1:] == together[1:]
    assert torch.equal(torch.get_rng_state(), state)


def test_sample_depends_on_the_seed_alone(numbers: ImageSet) -> None:
    first, again, other = numbers.sample(70, 1), numbers.sample(70, 1, workers=1), numbers.sample(70, 2)
    assert first.ids == again.ids != other.ids
    assert torch.equal(first.images, again.images)
    assert len(set(first.ids)) == 70
    assert [f"n{round(value * 255)}" for value in first.images[:, 0, 0, 0].tolist()] == first.ids
    assert [int(name[1:]) % 10 for name in first.ids] == first.labels.tolist()
    assert numbers.sample(20, 1).ids == first.ids[:20]


def test_sample_replaces_what_it_cannot_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = write_tree(tmp_path, [f"a/{number}.jpg" for number in range(10)])
    whole = ImageSet.from_folder(tmp_path, CONFIG).sample(10, 3).ids
    damage(tmp_path / whole[1])
    images = ImageSet.from_folder(tmp_path, CONFIG)
    assert images.sample(4, 3).ids == [whole[0], *whole[2:5]]
    assert images.skipped == [whole[1]]
    assert sorted(images.sample(10, 3).ids) == sorted(set(names) - {whole[1]})
    assert "all 9 readable ones used" in caplog.text


def test_a_chosen_part_has_every_class(numbers: ImageSet) -> None:
    chosen = numbers.choose(30)
    assert list(chosen) == sorted(chosen) and len(set(chosen)) == 30
    assert np.bincount([place % 10 for place in chosen]).tolist() == [3] * 10
    assert chosen == numbers.choose(30) != numbers.choose(30, seed=1)
    assert list(numbers.choose(100)) == list(numbers.choose(1000)) == list(range(100))


def test_sample_of_nothing(numbers: ImageSet) -> None:
    with pytest.raises(InputError, match="ask for one"):
        numbers.sample(0, 0)


def test_arrays_and_files_get_the_same_pixels(tmp_path: Path) -> None:
    names = write_tree(tmp_path, ["a/0.png", "a/1.png", "b/2.png"])
    arrays = np.stack([np.asarray(Image.open(tmp_path / name)) for name in names])
    from_arrays = ImageSet.from_arrays(arrays, np.array([0, 0, 1]), names, CONFIG, ["a", "b"])
    from_files = ImageSet.from_folder(tmp_path, CONFIG)
    assert torch.equal(everything(from_arrays)[0], everything(from_files)[0])
    assert everything(from_arrays)[1:] == everything(from_files)[1:]
    assert from_arrays.class_to_idx == from_files.class_to_idx


def test_arrays_that_do_not_belong_together() -> None:
    images, labels = np.zeros((2, 8, 8), np.uint8), np.zeros(2, np.int64)
    for bad in (
        (images.astype(np.float32), labels, ["a", "b"]),
        (images[0], labels, ["a", "b"]),
        (images, labels[:1], ["a", "b"]),
        (images, labels, ["a"]),
    ):
        with pytest.raises(ValueError, match="images"):
            ImageSet.from_arrays(*bad, CONFIG, ["x"])
