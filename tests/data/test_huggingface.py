"""Datasets of Hugging Face: splits, columns, labels, and what is refused."""

import io
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from ospq_export.data import open_source
from ospq_export.data.found import Found
from ospq_export.errors import InputError


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def dataset(labels: list[Any] | None = None, kind: Any = None, image: str = "image") -> datasets.Dataset:
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "PNG")
    content = {"bytes": buffer.getvalue(), "path": None}
    columns: dict[str, Any] = {image: [content] * 3} | ({} if labels is None else {"label": labels})
    features = {image: datasets.Image()} | ({} if kind is None else {"label": kind})
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def saved(tmp_path: Path, found: Any) -> str:
    found.save_to_disk(tmp_path / "saved")
    return str(tmp_path / "saved")


def opened(where: str) -> Found:
    found = open_source(where)
    assert isinstance(found, Found)
    return found


def test_rows_without_labels_or_names_keep_their_order(tmp_path: Path) -> None:
    found = opened(saved(tmp_path, dataset()))
    assert (list(found.ids), found.labels.codes) == (["0", "1", "2"], None)
    hidden = opened(saved(tmp_path / "x", dataset([-1, -1, -1], datasets.ClassLabel(names=["a", "b"]))))
    assert hidden.labels.codes is None


def test_labels(tmp_path: Path) -> None:
    classes = opened(saved(tmp_path / "a", dataset([1, 0, 1], datasets.ClassLabel(names=["x", "y"]))))
    assert (list(classes.names), classes.labels.numbered) == (["x", "y"], True)
    names = opened(saved(tmp_path / "b", dataset(["q", "p", "q"], datasets.Value("string"))))
    assert (list(names.names), names.labels.numbered) == (["p", "q"], False)
    numbers = opened(saved(tmp_path / "c", dataset([5, 0, 9], datasets.Value("int32"))))
    assert (list(numbers.names), numbers.labels.numbered) == ([], True)


def test_a_column_of_another_name_is_taken_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert len(opened(saved(tmp_path, dataset(image="picture"))).ids) == 3
    assert "the column picture is taken as `image`" in caplog.text


def test_selected_rows_are_the_images(tmp_path: Path) -> None:
    whole = dataset([0, 1, 2], datasets.Value("int64"))
    found = opened(saved(tmp_path, whole.select([2, 1])))
    assert found.labels.codes is not None and found.labels.codes.tolist() == [2, 1]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (dataset([0.5, 1, 2], datasets.Value("float32")), "the column `label` is float"),
        (dataset([0, 1, None], datasets.Value("int32")), "1 of 3 images have no label"),
        (dataset([0, 1, -1], datasets.Value("int32")), "the label -1 of 1 images is no class"),
        (datasets.Dataset.from_dict({"x": [1]}), "no column `image`, only x"),
        (datasets.DatasetDict(a=dataset(), b=dataset()), r"has the splits a, b .*say which: .*saved:a"),
    ],
)
def test_refused_in_one_line(tmp_path: Path, found: Any, expected: str) -> None:
    where = saved(tmp_path, found)
    for source in (where, f"hfds:{where}"):
        with pytest.raises(InputError, match=expected) as caught:
            open_source(source)
        assert "\n" not in str(caught.value) and where in str(caught.value)


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    where = saved(tmp_path, datasets.DatasetDict(a=dataset(), b=dataset()))
    (tmp_path / "empty").mkdir()
    for source in (f"hfds:{where}:c", f"hfds:{tmp_path / 'none'}", f"hfds:{tmp_path / 'empty'}"):
        with pytest.raises(InputError, match="this dataset cannot be loaded"):
            open_source(source)
