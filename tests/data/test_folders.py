"""Which files and folders below --data are images and classes, and what is said of the others."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from timm.utils.misc import natural_key as timms_key

from ospq_export.data.class_map import natural_key
from ospq_export.data.folders import Scan, scan_folder
from ospq_export.data.pixels import picture_extensions
from ospq_export.errors import InputError


def tree(root: Path, *names: str) -> Path:
    """Empty files at these paths; a name that ends in / is a folder."""
    for name in names:
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.touch()
    return root


def classes(scan: Scan) -> dict[str, str]:
    return dict(zip(scan.files, scan.class_of, strict=True))


def test_endings_are_those_that_pillow_reads_as_pictures(tmp_path: Path) -> None:
    endings = [
        "webp",
        "WEBP",
        "bmp",
        "tiff",
        "TIF",
        "ppm",
        "pgm",
        "gif",
        "jp2",
        "tga",
        "qoi",
        "ico",
        "png",
        "JPEG",
        "jfif",
    ]
    scan = scan_folder(tree(tmp_path, *(f"c/{i}.{ending}" for i, ending in enumerate(endings)), "c/x.pdf"))
    assert len(scan.files) == len(endings)
    assert scan.passed_over == {".pdf": 1}
    assert not {".pdf", ".eps", ".ps", ".mpg", ".wmf", ".h5"} & picture_extensions()


def test_natural_key_is_timms() -> None:
    names = ["a10b2", "A9", "x", "", "07/é3", "c0/10.png", "٣b"]
    assert [natural_key(name) for name in names] == [timms_key(name) for name in names]
    assert natural_key("m²")  # timm's own raises ValueError


def test_what_is_passed_over_is_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tree(
        tmp_path,
        *("cat/a.png", "cat/b.HEIC", "cat/c.heic", "cat/notes", "cat/Thumbs.db", "dog/d.png", "labels.txt"),
        *(".ipynb_checkpoints/a.png", "__MACOSX/cat/a.png", "cat/@eaDir/x.jpg", "lost+found/", "cat/._a.png"),
        *("dog/._d.png", "dog/.d.png", "dog/.DS_Store", "cat/.DS_Store"),
    )
    with caplog.at_level(logging.WARNING):
        scan = scan_folder(root)
    assert list(scan.files) == ["cat/a.png", "dog/d.png"]
    assert sorted(scan.names) == ["cat", "dog"]
    assert scan.passed_over == {
        ".DS_Store": 2,
        "._*": 2,
        ".*.png": 1,
        ".heic": 2,
        ".ipynb_checkpoints/": 1,
        ".txt": 1,
        "@eaDir/": 1,
        "Thumbs.db": 1,
        "__MACOSX/": 1,
        "lost+found/": 1,
        "no file name ending": 1,
    }
    assert "passed over 14 files or folders" in caplog.text
    assert "2 .heic" in caplog.text and ".ipynb_checkpoints/" in caplog.text


def test_an_empty_class_keeps_its_place(tmp_path: Path) -> None:
    scan = scan_folder(tree(tmp_path, "a/x.png", "b/x.heic", "c/", "d/x.png"))
    assert sorted(scan.names) == ["a", "b", "c", "d"]
    assert sorted(scan.empty) == ["b", "c"]


@pytest.mark.parametrize("inner", ["images", "IMG", "data/jpg"])
def test_a_container_below_the_class_is_no_class(tmp_path: Path, inner: str) -> None:
    scan = scan_folder(tree(tmp_path, f"n1/{inner}/x.JPEG", f"n2/{inner}/x.JPEG", "n2/y.png", "n2/boxes.txt"))
    assert set(scan.class_of) == {"n1", "n2"}
    assert scan.class_from == "first"


@pytest.mark.parametrize(
    "names",
    [
        ("a/x/outdoor/1.png", "b/x/outdoor/1.png"),
        ("church/outdoor/1.png", "market/outdoor/1.png"),
        ("a/abbey/1.png", "b/bakery/shop/1.png", "c/car/1.png"),
        ("imagenette/n01440764/1.png", "imagenette/n02102040/1.png"),
        ("cat/1.png", "cat/kitten/1.png", "dog/1.png"),
    ],
)
def test_ambiguous_nesting_is_refused_or_chosen(tmp_path: Path, names: tuple[str, ...]) -> None:
    root = tree(tmp_path, *names)
    with pytest.raises(InputError, match=r"`class_from` first or `class_from` path") as caught:
        scan_folder(root)
    assert "\n" not in str(caught.value)
    first, path = scan_folder(root, "first"), scan_folder(root, "path")
    assert classes(first) == {name: name.split("/")[0] for name in names}
    assert classes(path) == {name: name.rpartition("/")[0] for name in names}
    assert sorted(path.names) == sorted({name.rpartition("/")[0] for name in names})
    assert (first.class_from, path.class_from) == ("first", "path")


def test_path_classes_without_images_are_the_innermost_folders(tmp_path: Path) -> None:
    scan = scan_folder(tree(tmp_path, "a/x/1.png", "a/y/", "b/"), "path")
    assert sorted(scan.names) == ["a/x", "a/y", "b"]


@pytest.mark.parametrize(
    "names", [("train", "val"), ("Train", "VALIDATION"), ("training", "test"), ("val", "test", "meta")]
)
def test_a_folder_of_splits_is_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    root = tree(tmp_path, *(f"{name}/c0/1.png" for name in names))
    with pytest.raises(InputError, match="say which") as caught:
        scan_folder(root)
    assert f"`data` {root / names[0]}" in str(caught.value)
    assert f"`data` {root / names[1]}" in str(caught.value)
    assert set(scan_folder(root, "first").class_of) == set(names)


def test_flat_splits_and_one_split_alone(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="say which"):
        scan_folder(tree(tmp_path / "flat", "train/1.png", "test/1.png"))
    assert set(scan_folder(tree(tmp_path / "bus", "bus/1.png", "train/1.png")).class_of) == {"bus", "train"}


def test_flat_folder_with_folders_that_hold_no_image(tmp_path: Path) -> None:
    scan = scan_folder(tree(tmp_path, "a.png", "docs/readme.md", "b.png"))
    assert (list(scan.class_of), list(scan.names)) == (["", ""], [])
    assert scan.passed_over == {".md": 1, "docs/": 1}


def test_no_image_at_all_says_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no images in this folder, only 2 \.heic"):
        scan_folder(tree(tmp_path, "a/1.heic", "a/2.heic"))


def test_links(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tree(tmp_path / "data", "cat/1.png")
    tree(tmp_path / "elsewhere", "2.png")
    (root / "dog").symlink_to(tmp_path / "elsewhere")
    (root / "cat" / "loop").symlink_to(root)
    (root / "cat" / "self.png").symlink_to(root / "cat" / "self.png")
    (root / "cat" / "gone.png").symlink_to(root / "nowhere.png")
    os.mkfifo(root / "cat" / "pipe.png")
    with caplog.at_level(logging.WARNING):
        scan = scan_folder(root)
    assert classes(scan) == {"cat/1.png": "cat", "dog/2.png": "dog"}
    assert scan.passed_over == {
        "broken link": 2,
        "no regular file": 1,
        "symbolic link to a folder around it": 1,
    }
    assert "leads back" in caplog.text


def test_one_name_in_two_spellings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="other code points"):
        scan_folder(tree(tmp_path, "caf\u00e9/1.png", "cafe\u0301/1.png"))


def test_names_are_composed(tmp_path: Path) -> None:
    assert list(scan_folder(tree(tmp_path, "cafe\u0301/1.png")).names) == ["caf\u00e9"]


@pytest.mark.parametrize("ending", ["webp", "bmp", "tiff", "ppm", "gif", "jp2", "avif", "tga"])
def test_formats_are_read(tmp_path: Path, ending: str) -> None:
    from ospq_export.data.pixels import read_picture

    pixels = np.full((16, 16, 3), 128, np.uint8)
    try:
        Image.fromarray(pixels).save(tmp_path / f"x.{ending}")
    except (KeyError, OSError):
        pytest.skip("this Pillow does not write it")
    read, notes = read_picture(tmp_path / f"x.{ending}", "RGB")
    assert np.abs(np.asarray(read).astype(int) - 128).max() <= 2
    assert notes == ()
