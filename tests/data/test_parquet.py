"""Parquet files: how much of them is read, and what is refused."""

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ospq_export.data import ClassChoice, Classes, DataConfig, ImageSet, open_source
from ospq_export.data.found import Found
from ospq_export.data.parquet import Group, ParquetSource
from ospq_export.errors import InputError

CONFIG = DataConfig(
    input_size=(1, 8, 8), mean=(0,), std=(1,), interpolation="nearest", crop_pct=1, crop_mode="center"
)


def grey(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), value).save(buffer, "PNG")
    return buffer.getvalue()


def shuffled(root: Path, count: int = 60) -> Path:
    """Rows in random order, ten to a group, in two files; image n is of the colour n."""
    order = np.random.default_rng(0).permutation(count)
    rows = [{"bytes": grey(int(n)), "path": f"{n}.png"} for n in order]
    pq.write_table(pa.table({"image": rows[:35]}), root / "0.parquet", row_group_size=10)
    pq.write_table(pa.table({"image": rows[35:]}), root / "1.parquet", row_group_size=10)
    return root


def opened(where: Path) -> ImageSet:
    found = open_source(where, ClassChoice())
    assert isinstance(found, Found)
    return ImageSet.from_found(found, CONFIG, Classes())


def values(images: torch.Tensor) -> list[int]:
    return (images[:, 0, 0, 0] * 255).round().int().tolist()


def test_rows_are_read_in_one_pass_over_their_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = opened(shuffled(tmp_path))
    read: list[tuple[str, int]] = []
    whole = Group.images

    def counted(group: Group, rows: Any) -> Any:
        read.append((group.path.name, group.place))
        return whole(group, rows)

    monkeypatch.setattr(Group, "images", counted)
    assert [value for batch in images.batches(7) for value in values(batch.images)] == list(range(60))
    groups = [("0.parquet", n) for n in range(4)] + [("1.parquet", n) for n in range(3)]
    assert read == groups
    read.clear()
    sample = images.sample(3, 0)
    assert [f"{value}.png" for value in values(sample.images)] == sample.ids
    assert 0 < len(read) <= 3


def test_a_single_row(tmp_path: Path) -> None:
    found = open_source(shuffled(tmp_path))
    assert isinstance(found, Found)
    source = found.source(np.zeros(60, np.int64))
    assert isinstance(source, ParquetSource)
    assert np.asarray(source.decode(41, "L", False)[0]).max() == 41


def test_images_that_rows_name_or_lack(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(grey(1))
    rows = [
        {"bytes": None, "path": "a/1.png"},
        {"bytes": None, "path": "a/2.png"},
        {"bytes": grey(3), "path": "a/3.png"},
    ]
    pq.write_table(pa.table({"image": rows}), tmp_path / "x.parquet")
    images = opened(tmp_path / "x.parquet")
    assert [batch.ids for batch in images.batches(4)] == [["a/1.png", "a/3.png"]]
    assert images.skipped == ["a/2.png"]
    pq.write_table(pa.table({"image": [None, grey(1)]}), tmp_path / "y.parquet")
    images = opened(tmp_path / "y.parquet")
    assert [batch.ids for batch in images.batches(4)] == [["1"]] and images.skipped == ["0"]


def test_a_damaged_row_group_is_skipped_and_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    rows = []
    for n in range(20):
        buffer = io.BytesIO()
        Image.fromarray(noise.integers(0, 256, (8, 8), dtype=np.uint8)).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": f"{n}.png"})
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": rows}), path, row_group_size=10, compression="zstd")
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    content = bytearray(path.read_bytes())
    start, size = column.dictionary_page_offset, column.total_compressed_size
    content[start : start + size] = bytes(size)
    path.write_bytes(content)
    images = opened(path)
    assert [name for batch in images.batches(4) for name in batch.ids] == [f"{n}.png" for n in range(10, 20)]
    assert images.skipped == [f"{n}.png" for n in range(10)]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"img": [b"1"]}, "no column `image`, only img"),
        ({"image": ["text"]}, "the column `image` is string"),
        ({"image": [{"path": "x"}]}, "the column `image` is struct<path: string>"),
        ({"image": [b"1"], "label": [0.5]}, "the column `label` is double"),
        ({"image": [b"1"], "label": [[1]]}, "the column `label` is list"),
        ({"image": [b"1", b"2"], "label": [1, None]}, "1 of 2 images have no label"),
        ({"image": [b"1", b"2"], "label": ["a", None]}, "1 of 2 images have no label"),
        ({"image": [b"1", b"2"], "label": [1, -1]}, "the label -1 of 1 images is no class"),
        ({"image": pa.array([], pa.binary())}, "no images in this source"),
    ],
)
def test_refused_in_one_line(tmp_path: Path, columns: dict[str, Any], expected: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=expected) as caught:
        open_source(tmp_path / "x.parquet")
    assert "\n" not in str(caught.value) and "x.parquet" in str(caught.value)


def test_damaged_files_and_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = (shuffled(tmp_path) / "0.parquet").read_bytes()
    for content in (b"", b"PAR1 nonsense", whole[:-30], whole[: len(whole) // 2]):
        (tmp_path / "0.parquet").write_bytes(content)
        with pytest.raises(InputError, match=r"this Parquet file cannot be read: .*0\.parquet") as caught:
            open_source(tmp_path)
        assert "\n" not in str(caught.value)
    for package, where in (("pyarrow.parquet", tmp_path), ("datasets", "hfds:x"), ("datasets", "hfids:x")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(InputError, match=r"pip install 'ospq-export\[data\]'"):
            open_source(where)
