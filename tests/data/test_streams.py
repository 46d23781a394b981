"""Images of unknown number: samples in one pass, in little memory, and one pass over all."""

import io
import os
import sys
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from ospq_export.data import ClassChoice, Classes, DataConfig, StreamSet, image_set, open_source
from ospq_export.data.sources import Record
from ospq_export.data.streams import Stream
from ospq_export.errors import InputError

CONFIG = DataConfig(
    input_size=(1, 8, 8), mean=(0,), std=(1,), interpolation="nearest", crop_pct=1, crop_mode="center"
)
KNOWN = Classes({"a": 0, "b": 1}, "a run")


def grey(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), value).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


MEMBERS = {f"{'ab'[n % 2]}/{n}.png": grey(n) for n in range(40)}


def opened(
    where: str | Path, known: Classes | None = KNOWN, needed: bool = True, **choice: object
) -> StreamSet:
    said = ClassChoice(**choice)  # type: ignore[arg-type]
    found = image_set(open_source(where, said), CONFIG, said, 2, known, needed=needed)
    assert isinstance(found, StreamSet)
    return found


def values(images: torch.Tensor) -> list[int]:
    return (images[:, 0, 0, 0] * 255).round().int().tolist()


@pytest.mark.parametrize("ending", ["tar.gz", "tgz", "tar.bz2", "tar.xz"])
def test_all_images_in_one_pass(tmp_path: Path, ending: str) -> None:
    mode = {"bz2": "w:bz2", ".xz": "w:xz"}.get(ending[-3:], "w:gz")
    images = opened(write_tar(tmp_path / f"x.{ending}", MEMBERS, mode))
    batches = list(images.batches(7))
    assert [len(batch) for batch in batches] == [7] * 5 + [5]
    assert [name for batch in batches for name in batch.ids] == list(MEMBERS)
    assert [value for batch in batches for value in values(batch.images)] == list(range(40))
    assert torch.cat([batch.labels for batch in batches]).tolist() == [0, 1] * 20
    again = torch.cat([batch.images for batch in images.batches(16, workers=1)])
    assert torch.equal(again, torch.cat([batch.images for batch in batches]))
    assert (images.class_to_idx, images.record.classes_source) == (KNOWN.indices, "a run")


def test_a_sample_depends_on_the_seed_alone_and_is_uniform(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar.gz", MEMBERS)
    first, again, other = (
        opened(path).sample(10, seed, workers) for seed, workers in ((1, 0), (1, 1), (2, 0))
    )
    assert first.ids == again.ids != other.ids and torch.equal(first.images, again.images)
    assert len(set(first.ids)) == 10
    assert [list(MEMBERS).index(name) for name in first.ids] == values(first.images)
    counts: Counter[int] = Counter()
    records = [Record(str(n), b"") for n in range(20)]
    images = StreamSet(Stream("x", lambda: iter(records)), CONFIG, Classes())
    for seed in range(400):
        drawn = images._drawn(5, seed)
        counts.update(place for place, _ in drawn)
        assert len({place for place, _ in drawn}) == 5
    # 400 draws of 5 out of 20: 100 each, standard deviation 8.7.
    assert len(counts) == 20 and max(abs(count - 100) for count in counts.values()) < 40


def test_a_sample_holds_no_more_than_itself() -> None:
    held: set[int] = set()
    most = 0

    class Content(bytes):
        def __del__(self) -> None:
            held.discard(id(self))

    def records() -> Iterator[Record]:
        nonlocal most
        for n in range(2000):
            content = Content(b"x")
            held.add(id(content))
            yield Record(str(n), content)
            del content
            most = max(most, len(held))

    StreamSet(Stream("x", records), CONFIG, Classes())._drawn(50, 0)
    assert most <= 55


def test_damaged_images_are_replaced_skipped_and_named(tmp_path: Path) -> None:
    broken = {
        name: content[:40] if n % 5 == 0 else content for n, (name, content) in enumerate(MEMBERS.items())
    }
    images = opened(write_tar(tmp_path / "x.tar.gz", broken))
    sample = images.sample(16, 0)
    assert len(sample) == 16 and not any(value % 5 == 0 for value in values(sample.images))
    assert set(images.skipped) < {name for n, name in enumerate(MEMBERS) if n % 5 == 0}
    assert [v for batch in images.batches(9) for v in values(batch.images)] == [n for n in range(40) if n % 5]
    assert len(images.skipped) == 8


def test_a_part_is_drawn_in_the_streams_order(tmp_path: Path) -> None:
    part = opened(write_tar(tmp_path / "x.tar.gz", MEMBERS)).drawn(12)
    assert len(part) == 12
    found = [value for batch in part.batches(5) for value in values(batch.images)]
    assert found == sorted(found) and part.ids == [list(MEMBERS)[value] for value in found]


def test_more_asked_for_than_there_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sample = opened(write_tar(tmp_path / "x.tar.gz", MEMBERS)).sample(100, 0)
    assert sorted(values(sample.images)) == list(range(40))
    assert "100 images asked for, all 40 readable ones used" in caplog.text


def test_a_fifo_and_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = write_tar(tmp_path / "x.tar", MEMBERS, "w").read_bytes()
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(content))
    writer.start()
    piped = opened(tmp_path / "pipe").sample(10, 1)
    writer.join()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    assert opened("-").sample(10, 1).ids == piped.ids
    compressed = write_tar(tmp_path / "x.tar.gz", MEMBERS).read_bytes()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(compressed)))
    assert opened("-").sample(10, 1).ids == piped.ids


def test_labels_beside_the_images(tmp_path: Path) -> None:
    members = {
        "0.json": b'{"label": 5}',
        "0.png": grey(0),
        "0.cls": b"1",
        "1.png": grey(1),
        "1.json": b'{"label": "a"}',
    }
    images = opened(write_tar(tmp_path / "x.tar.gz", members))
    assert next(images.batches(4)).labels.tolist() == [1, 0]
    numbers = {"0.png": grey(0), "0.cls": b"1", "1.png": grey(1), "1.cls": b" 0\n"}
    images = opened(write_tar(tmp_path / "x.tar.gz", numbers), known=None)
    assert next(images.batches(4)).labels.tolist() == [1, 0]


def test_a_folders_name_is_no_number(tmp_path: Path) -> None:
    (tmp_path / "map.txt").write_text('["10", "9"]')
    path = write_tar(tmp_path / "x.tar.gz", {"9/a.png": grey(0), "10/a.png": grey(1)})
    assert next(opened(path, None, map_file=tmp_path / "map.txt").batches(4)).labels.tolist() == [1, 0]
    with pytest.raises(InputError, match=r"class '9' of 9/a.png cannot be numbered .*`class_map`"):
        list(opened(path, None).batches(4))
    assert next(opened(path, None, needed=False).batches(4)).labels.tolist() == [-1, -1]


def test_images_without_labels(tmp_path: Path) -> None:
    images = opened(write_tar(tmp_path / "x.tar.gz", {"1.png": grey(1)}))
    assert next(images.batches(4)).labels.tolist() == [-1]
    assert images.record.classes_source is None


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({}, "no image in this stream can be read"),
        ({"readme.txt": b"x"}, "no image in this stream can be read"),
        ({"1.png": b"x"}, "no image in this stream can be read"),
        ({"c/1.png": grey(1)}, r"class 'c' of c/1.png is not among 2 classes"),
        ({"a/x/y/1.png": grey(1)}, "a class could be 'a' or 'a/x/y'"),
        ({"a/1.png": grey(1), "1.png": grey(1)}, "1.png has no label, unlike those before"),
        ({"1.png": grey(1), "1.cls": b"-4"}, "the label -4 of 1.png is no class"),
        ({"1.png": grey(1), "1.cls": b"0", "1.jpg": b""}, "share a label"),
    ],
)
def test_refused(tmp_path: Path, members: dict[str, bytes], expected: str) -> None:
    path = write_tar(tmp_path / "x.tar.gz", members)
    with pytest.raises(InputError, match=expected) as caught:
        list(opened(path).batches(4))
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("ending", ["tar.gz", "tar.xz", "tar.bz2"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 0.97])
def test_a_stream_that_breaks_off(tmp_path: Path, ending: str, share: float) -> None:
    noise = np.random.default_rng(0)
    members = {f"a/{n}.png": noise.bytes(3000) for n in range(40)} | {"a/x.png": grey(1)}
    path = write_tar(tmp_path / f"x.{ending}", members, f"w:{ending[4:]}")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    for use in (lambda: list(opened(path).batches(8)), lambda: opened(path).sample(8, 0)):
        with pytest.raises(InputError, match="cannot be used"):
            use()


def test_a_streamed_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["b", "a"])})
    rows = [{"image": {"bytes": grey(n), "path": None}, "label": n % 2} for n in range(20)]
    (tmp_path / "d").mkdir()
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "d" / "test.parquet")
    images = opened(f"hfids:{tmp_path / 'd'}:test")
    batch = next(images.batches(64))
    assert (values(batch.images), batch.labels.tolist()) == (list(range(20)), [1, 0] * 10)
    assert batch.ids[:2] == ["00000000", "00000001"]
    assert len(images.sample(5, 0)) == 5
    with pytest.raises(InputError, match="cannot be loaded"):
        list(opened(f"hfids:{tmp_path / 'none'}").batches(4))
