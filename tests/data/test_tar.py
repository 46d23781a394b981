"""Tar files: their index, what is passed over in them, and what is refused before any work."""

import gc
import io
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ospq_export.data import ClassChoice, open_source
from ospq_export.data.found import Found
from ospq_export.data.tar import TarSource
from ospq_export.errors import InputError


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()


def write_tar(path: Path, *names: str, **contents: bytes) -> Path:
    """Pictures of these names, and other members as given, `a__cls` for a.cls."""
    members = dict.fromkeys(names, PNG) | {name.replace("__", "."): c for name, c in contents.items()}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def found_in(path: Path, choice: ClassChoice | None = None) -> Found:
    found = open_source(path, choice)
    assert isinstance(found, Found)
    return found


def test_folders_in_a_tar_are_read_as_folders_on_a_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_tar(
        tmp_path / "x.tar", "./cat/images/2.png", "cat/images/10.PNG", "dog/._1.png", "dog/1.png", "a/1.heic"
    )
    with tarfile.open(path, "a") as archive:
        folder = tarfile.TarInfo("emu")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        link = tarfile.TarInfo("dog/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "1.png"
        archive.addfile(link)
    found = found_in(path)
    assert list(found.ids) == ["cat/images/2.png", "cat/images/10.PNG", "dog/1.png"]
    assert sorted(found.names) == ["a", "cat", "dog", "emu"]
    assert (found.class_from, sorted(found.empty)) == ("first", ["a", "emu"])
    assert found.passed_over == {"._1.png": 1, ".heic": 1, "no regular file": 1}
    assert "passed over 3 files" in caplog.text


def test_long_names_and_names_that_are_not_utf8(tmp_path: Path) -> None:
    long = "c/" + "x" * 300 + ".png"
    found = found_in(write_tar(tmp_path / "x.tar", long, "c/\udcff.png"))
    assert list(found.ids) == [long, "c/\ufffd.png"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("a/x/outdoor/1.png", "b/1.png"), "`class_from` first or `class_from` path"),
        (("train/1.png", "val/1.png"), r"this archive holds train/ and val/.*: give one of them"),
        (("a/1.png", "2.png"), "both in class folders and beside them"),
        (("a/1.heic", "readme"), r"no images in this archive, only 1 \.heic, 1 no file name ending"),
        ((), "no images in this archive"),
        (("a/1.png", "./a/1.png"), "1 images have another's name: a/1.png"),
    ],
)
def test_refused_folders(tmp_path: Path, names: tuple[str, ...], expected: str) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        open_source(write_tar(tmp_path / "x.tar", *names))
    assert "\n" not in str(caught.value) and "x.tar" in str(caught.value)


def test_whole_paths_as_classes(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", "a/x/1.png", "b/x/1.png")
    assert sorted(found_in(path, ClassChoice(level="path")).names) == ["a/x", "b/x"]


def test_labels_beside_the_images(tmp_path: Path) -> None:
    found = found_in(
        write_tar(
            tmp_path / "x.tar",
            *("1.png", "2.jpg", "3.png"),
            **{
                "1__cls": b"7\n",
                "1__json": b'{"label": 3}',
                "2__json": b'{"label": 5, "text": "x"}',
                "3__cls": b"0",
            },
            **{"info__json": b"[1]"},
        )
    )
    assert list(found.ids) == ["1.png", "2.jpg", "3.png"]
    assert found.labels.codes is not None and found.labels.codes.tolist() == [7, 5, 0]
    assert found.passed_over == {".json without a label": 1}


@pytest.mark.parametrize(
    ("names", "contents", "expected"),
    [
        (("1.png", "2.png"), {"1__cls": b"7"}, "1 of 2 images have no label"),
        (("1.png", "2.png"), {"1__cls": b"7", "2__cls": b" "}, "1 of 2 images have no label"),
        (("1.png",), {"1__cls": b"-3"}, "the label -3 of 1 images is no class"),
        (("1.png",), {"1__cls": b"\xff\xfe"}, "is not UTF-8"),
        (("1.png",), {"1__json": b'{"label": [1]}'}, r"the label '\[1\]' is no class"),
        (("1.png",), {"1__json": b'{"label": true}'}, "the label 'True' is no class"),
        (("1.png",), {"1__json": b'{"label": 1.5}'}, r"the label '1\.5' is no class"),
        (("1.png", "1.seg.png"), {"1__cls": b"7"}, r"2 images share a label with another, such as 1\.png"),
        ((), {"1__cls": b"7"}, "no images"),
    ],
)
def test_refused_labels(
    tmp_path: Path, names: tuple[str, ...], contents: dict[str, bytes], expected: str
) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        open_source(write_tar(tmp_path / "x.tar", *names, **contents))
    assert "\n" not in str(caught.value) and "x.tar" in str(caught.value)


def test_shards_that_count_from_zero_each(tmp_path: Path) -> None:
    for shard in "ab":
        write_tar(tmp_path / f"{shard}.tar", "0.png", "1.png", **{"0__cls": b"0", "1__cls": b"1"})
    found = found_in(tmp_path)
    assert list(found.ids) == ["a/0.png", "a/1.png", "b/0.png", "b/1.png"]
    assert found.labels.codes is not None and found.labels.codes.tolist() == [0, 1, 0, 1]


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize("size", [0, 100, 512, 700, 1024, 1100, 2048])
def test_a_tar_that_ends_early(tmp_path: Path, size: int) -> None:
    write_tar(tmp_path / "a.tar", "a/1.png", "a/2.png")
    cut(write_tar(tmp_path / "b.tar", "b/1.png", "b/2.png"), size)
    with pytest.raises(InputError, match=r"cannot be used: .*ends early") as caught:
        open_source(tmp_path)
    assert str(tmp_path / "b.tar") in str(caught.value)


def test_a_damaged_header_and_no_tar_at_all(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", "a/1.png", "a/2.png")
    content = bytearray(path.read_bytes())
    content[1024 + 10] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(InputError, match="it is damaged"):
        open_source(path)
    path.write_bytes(b"no tar file " * 100)
    with pytest.raises(InputError, match="or no tar file"):
        open_source(path)


def test_a_tar_that_changed_after_it_was_read(tmp_path: Path) -> None:
    found = found_in(write_tar(tmp_path / "x.tar", "a/1.png"))
    source = found.source(np.zeros(1, np.int64))
    cut(tmp_path / "x.tar", 540)
    with pytest.raises(OSError, match="Truncated"):
        source.decode(0, "L", False)


def test_the_index_is_all_that_is_kept(tmp_path: Path) -> None:
    """Bytes per image in memory, beside its name, do not depend on the images' sizes or the headers."""
    count = 3000
    path = write_tar(tmp_path / "x.tar", *(f"c{n % 10}/{n}.png" for n in range(count)))

    def traced() -> tuple[int, int]:
        gc.collect()
        tracemalloc.start()
        found = found_in(path)
        gc.collect()
        memory = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert isinstance(found.source(np.zeros(count, np.int64)), TarSource)
        return memory

    # The interpreter's own tables, of interned strings above all, are traced too where they happen to be doubled: 15 MB in a
    # process with torch. That, and what is imported only now, happens once; what the index keeps is there each time.
    kept, peak = map(min, zip(*(traced() for _ in range(3)), strict=True))
    assert kept / count < 250
    assert peak / count < 1200
