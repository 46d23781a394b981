"""The same images from every source: one order, one sample, the same tensors, ids and labels."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ospq_export.data import ClassChoice, Classes, DataConfig, ImageSet, image_set, open_source
from ospq_export.data.class_map import natural_order
from ospq_export.data.found import Found, natural_places
from ospq_export.errors import InputError

CONFIG = DataConfig(
    input_size=(3, 16, 16),
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.25, 0.5),
    interpolation="bicubic",
    crop_pct=0.8,
    crop_mode="center",
)
# In an order that is neither plain nor natural; lossless, so that arrays can be compared too.
NAMES = [f"{folder}/{n}.png" for n in (10, 9, 1, 100, 2) for folder in ("b", "A", "c")]
Files = dict[str, bytes]


def encoded(seed: int, side: int = 24) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def files() -> Files:
    return {name: encoded(seed) for seed, name in enumerate(NAMES)}


def class_of(name: str) -> str:
    return name[0]


def folder(root: Path, files: Files) -> str:
    for name, content in files.items():
        (root / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "f" / name).write_bytes(content)
    return str(root / "f")


def write_tar(path: Path, members: Files, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def split(files: Files) -> list[Files]:
    items = list(files.items())
    return [dict(items[:4]), dict(items[4:11]), dict(items[11:])]


def class_folders_in_one_tar(root: Path, files: Files) -> str:
    return str(write_tar(root / "one.tar", {f"./{name}": content for name, content in files.items()}))


def webdataset_shards(root: Path, files: Files) -> str:
    for place, part in enumerate(split(files)):
        members = {}
        for name, content in part.items():
            members[name] = content
            members[f"{name.removesuffix('.png')}.cls"] = class_of(name).encode()
        write_tar(root / f"s-{place:02d}.tar", members)
    return str(root / "s-{00..02}.tar")


def shards_with_json(root: Path, files: Files) -> str:
    (root / "json").mkdir()
    for place, part in enumerate(split(files)):
        members = {}
        for name, content in part.items():
            members[f"{name.removesuffix('.png')}.json"] = json.dumps({"label": class_of(name)}).encode()
            members[name] = content
        write_tar(root / "json" / f"{place}.tar", members)
    return str(root / "json")


def table(files: Files, **columns: Any) -> pa.Table:
    images = [{"bytes": content, "path": name} for name, content in files.items()]
    return pa.table({"image": images, "label": [class_of(name) for name in files], **columns})


def parquet(root: Path, files: Files) -> str:
    (root / "parquet").mkdir()
    for place, part in enumerate(split(files)):
        pq.write_table(table(part), root / "parquet" / f"{place}.parquet", row_group_size=2)
    return str(root / "parquet" / "*.parquet")


def parquet_of_bytes(root: Path, files: Files) -> str:
    columns = {
        "image": list(files.values()),
        "path": list(files),
        "label": [class_of(name) for name in files],
    }
    pq.write_table(pa.table(columns), root / "bytes.parquet")
    return str(root / "bytes.parquet")


def npz(root: Path, files: Files) -> str:
    images = np.stack([np.asarray(Image.open(io.BytesIO(content))) for content in files.values()])
    np.savez(root / "x.npz", images=images, labels=[class_of(name) for name in files], ids=list(files))
    return str(root / "x.npz")


def listed(root: Path, files: Files) -> str:
    folder(root, files)
    lines = [f"f/{name},{class_of(name)}" for name in files]
    (root / "x.csv").write_text("\n".join(["path,label", *lines]))
    return str(root / "x.csv")


def hugging_face(root: Path, files: Files) -> datasets.Dataset:
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["b", "c", "A"])}
    )
    # save_to_disk keeps file names without their folders.
    rows = table({name.replace("/", "_"): content for name, content in files.items()}).to_pylist()
    return datasets.Dataset.from_list(rows, features=features)


def saved(root: Path, files: Files) -> str:
    hugging_face(root, files).save_to_disk(root / "hf")
    return str(root / "hf")


def split_of_a_saved_dict(root: Path, files: Files) -> str:
    whole = hugging_face(root, files)
    datasets.DatasetDict(train=whole.select([0]), test=whole).save_to_disk(root / "dict")
    return f"hfds:{root / 'dict'}:test"


def hugging_face_parquet(root: Path, files: Files) -> str:
    (root / "hub").mkdir()
    hugging_face(root, files).to_parquet(root / "hub" / "test-0.parquet", batch_size=3)
    return str(root / "hub")


def loaded_by_datasets(root: Path, files: Files) -> str:
    return f"hfds:{hugging_face_parquet(root, files)}:test"


SOURCES = [
    class_folders_in_one_tar,
    webdataset_shards,
    shards_with_json,
    parquet,
    parquet_of_bytes,
    npz,
    listed,
    saved,
    split_of_a_saved_dict,
    hugging_face_parquet,
    loaded_by_datasets,
]
CHOICE = ClassChoice(order="natural")


def name_in(source: Callable[[Path, Files], str]) -> Callable[[str], str]:
    """What an image of the folder is called in a source."""
    flat = source in (saved, split_of_a_saved_dict, hugging_face_parquet, loaded_by_datasets)
    return lambda name: name.replace("/", "_") if flat else f"f/{name}" if source is listed else name


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def opened(where: str, choice: ClassChoice = CHOICE, outputs: int | None = 3, **kwargs: Any) -> ImageSet:
    found = image_set(open_source(where, choice), CONFIG, choice, outputs, **kwargs)
    assert isinstance(found, ImageSet)
    return found


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_folders_sample(
    tmp_path: Path, files: Files, source: Callable[[Path, Files], str]
) -> None:
    reference = ImageSet.from_folder(Path(folder(tmp_path / "reference", files)), CONFIG, choice=CHOICE)
    expected = reference.sample(9, seed=3)
    images = opened(source(tmp_path, files))
    called = name_in(source)
    assert list(images.ids) == list(map(called, natural_order(NAMES)))
    for workers in (0, 1):
        sample = images.sample(9, 3, workers)
        assert sample.ids == list(map(called, expected.ids))
        assert torch.equal(sample.images, expected.images)
        assert torch.equal(sample.labels, expected.labels)
    assert images.class_to_idx == {"A": 0, "b": 1, "c": 2} == reference.class_to_idx
    chosen = images.choose(6)
    assert chosen == reference.choose(6)
    ours, theirs = list(images.batches(4, chosen)), list(reference.batches(4, chosen))
    assert [len(batch) for batch in ours] == [4, 2]
    assert all(torch.equal(a.images, b.images) for a, b in zip(ours, theirs, strict=True))


def test_arrays_without_names_keep_their_order(tmp_path: Path) -> None:
    values = np.arange(11, dtype=np.uint8)
    np.save(tmp_path / "x.npy", np.broadcast_to(values[:, None, None], (11, 16, 16)))
    images = opened(str(tmp_path / "x.npy"), ClassChoice())
    assert list(images.ids) == [f"{n:02d}" for n in range(11)]
    batch = next(images.batches(11, workers=1))
    mean, std = torch.tensor(CONFIG.mean), torch.tensor(CONFIG.std)
    assert torch.allclose(batch.images[:, :, 3, 3] * std + mean, torch.arange(11)[:, None] / 255, atol=1e-6)
    assert batch.labels.tolist() == [-1] * 11
    np.savez(tmp_path / "x.npz", images=np.broadcast_to(values[:, None, None], (11, 16, 16)))
    again = opened(str(tmp_path / "x.npz"), ClassChoice())
    assert torch.equal(next(again.batches(11)).images, batch.images) and again.ids == images.ids


@given(st.lists(st.text("aB0129/é_.", min_size=1, max_size=6), unique=True))
def test_order_of_names_does_not_depend_on_how_they_came(names: list[str]) -> None:
    ordered = [names[place] for place in natural_places(names)]
    turned = names[::-1]
    assert ordered == natural_order(names) == [turned[place] for place in natural_places(turned)]


@pytest.mark.parametrize("source", [folder, webdataset_shards, parquet, saved])
def test_damaged_images_are_skipped_and_named(
    tmp_path: Path, files: Files, source: Callable[[Path, Files], str]
) -> None:
    broken = {**files, "A/9.png": files["A/9.png"][:-300], "b/2.png": b""}
    images = opened(source(tmp_path, broken))
    ids = [name for batch in images.batches(4) for name in batch.ids]
    called = name_in(source)
    assert ids == [called(name) for name in natural_order(NAMES) if name not in ("A/9.png", "b/2.png")]
    assert images.skipped == [called("A/9.png"), called("b/2.png")]
    assert len(images.sample(14, 0)) == 13


NUMBERS = {name: place % 3 for place, name in enumerate(NAMES)}


def numbers_in_tar(root: Path, files: Files) -> str:
    members = {}
    for name, content in files.items():
        members |= {name: content, f"{name[:-4]}.cls": str(NUMBERS[name]).encode()}
    return str(write_tar(root / "n.tar", members))


def numbers_in_json(root: Path, files: Files) -> str:
    members = {}
    for name, content in files.items():
        members |= {name: content, f"{name[:-4]}.json": json.dumps({"label": NUMBERS[name]}).encode()}
    return str(write_tar(root / "n.tar", members))


def numbers_in_list(root: Path, files: Files) -> str:
    root = Path(folder(root, files))
    (root / "x.tsv").write_text("".join(f"{name}\t{NUMBERS[name]}\r\n" for name in files))
    return str(root / "x.tsv")


def numbers_in_parquet(root: Path, files: Files) -> str:
    columns = {"image": list(files.values()), "path": list(files), "label": [NUMBERS[name] for name in files]}
    pq.write_table(pa.table(columns), root / "n.parquet")
    return str(root / "n.parquet")


def numbers_in_npz(root: Path, files: Files) -> str:
    images = np.zeros((len(files), 16, 16), np.uint8)
    np.savez(
        root / "n.npz", images=images, ids=list(files), labels=np.array(list(NUMBERS.values()), np.uint8)
    )
    return str(root / "n.npz")


@pytest.mark.parametrize(
    "source", [numbers_in_tar, numbers_in_json, numbers_in_list, numbers_in_parquet, numbers_in_npz]
)
def test_whole_numbers_are_the_networks_outputs(
    tmp_path: Path, files: Files, source: Callable[[Path, Files], str]
) -> None:
    where = source(tmp_path, files)
    images = opened(where, ClassChoice(), outputs=10)
    batch = next(images.batches(100))
    assert batch.labels.tolist() == [NUMBERS[name] for name in natural_order(NAMES)]
    assert images.record.classes_source == "whole numbers in the data, taken as the network's outputs"
    assert images.class_to_idx == {}
    run = Classes({"cat": 0, "dog": 1, "emu": 2}, "class_order=plain")
    known = opened(where, ClassChoice(), outputs=3, known=run)
    assert torch.equal(next(known.batches(100)).labels, batch.labels)
    assert known.class_to_idx == run.indices
    with pytest.raises(InputError, match="label 2, but the network has 2 classes"):
        opened(where, ClassChoice(), outputs=2)
    assert next(opened(where, ClassChoice(), 2, needed=False).batches(4)).labels.tolist() == [-1] * 4
    with pytest.raises(InputError, match="`class_order` orders class names"):
        opened(where, CHOICE, outputs=10)


def test_names_behind_numbers_decide_where_they_are_known(tmp_path: Path, files: Files) -> None:
    where = saved(tmp_path, files)
    named = {"b": 0, "c": 1, "A": 2}
    own = opened(where, ClassChoice())
    assert own.class_to_idx == named and "own numbering" in str(own.record.classes_source)
    assert next(own.batches(1)).labels.tolist() == [2]
    run = opened(where, ClassChoice(), known=Classes({"A": 1, "b": 2, "c": 0, "d": 3}, "x"), outputs=4)
    assert next(run.batches(1)).labels.tolist() == [1]
    other = opened(where, ClassChoice(), known=Classes({"p": 0, "q": 1, "r": 2}, "x"))
    assert next(other.batches(1)).labels.tolist() == [2]
    with pytest.raises(InputError, match="class names are not among"):
        opened(where, ClassChoice(), known=Classes({"A": 0, "b": 1, "q": 2}, "x"))


def test_class_map_numbers_the_names_of_every_source(tmp_path: Path, files: Files) -> None:
    (tmp_path / "map.txt").write_text("c\nb\nA\nd\n")
    choice = ClassChoice(tmp_path / "map.txt")
    for source in (listed, parquet_of_bytes, webdataset_shards):
        images = opened(source(tmp_path, files), choice, outputs=4)
        assert next(images.batches(1)).labels.tolist() == [2]
        assert images.record.classes_source == f"class_map={tmp_path / 'map.txt'}"
    (tmp_path / "map.txt").write_text("c\nb\n")
    with pytest.raises(InputError, match="1 class names are not among"):
        opened(listed(tmp_path, files), choice, outputs=2)


def test_names_with_two_orders_are_refused(tmp_path: Path, files: Files) -> None:
    labels = ["c9" if place % 2 else "c10" for place in range(len(files))]
    pq.write_table(pa.table({"image": list(files.values()), "label": labels}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match="the class names have two orders") as caught:
        opened(str(tmp_path / "x.parquet"), ClassChoice(), outputs=2)
    assert "`class_order`" in str(caught.value)
    assert opened(str(tmp_path / "x.parquet"), CHOICE, outputs=2).class_to_idx == {"c9": 0, "c10": 1}


def test_rows_with_a_name_twice_keep_their_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"bytes": encoded(n), "path": f"{n % 2}.png"} for n in range(4)]
    pq.write_table(pa.table({"image": rows}), tmp_path / "x.parquet")
    assert list(opened(str(tmp_path / "x.parquet"), ClassChoice()).ids) == ["0", "1", "2", "3"]
    assert "not every row has a path of its own" in caplog.text


# Images as folders tell them


def bare(tmp_path: Path, files: Files) -> dict[str, str]:
    """Sources of the same images without labels."""
    flat = {name.replace("/", "_"): content for name, content in files.items()}
    images = np.stack([np.asarray(Image.open(io.BytesIO(content))) for content in flat.values()])
    np.savez(tmp_path / "u.npz", images=images, ids=list(flat))
    columns = {"image": list(flat.values()), "path": list(flat)}
    pq.write_table(pa.table(columns), tmp_path / "u.parquet")
    (tmp_path / "f").mkdir()
    for name, content in flat.items():
        (tmp_path / "f" / name).write_bytes(content)
    (tmp_path / "f" / "u.txt").write_text("\n".join(flat) + "\n")
    return {
        "tar": str(write_tar(tmp_path / "u.tar", flat)),
        "npz": str(tmp_path / "u.npz"),
        "parquet": str(tmp_path / "u.parquet"),
        "list": str(tmp_path / "f" / "u.txt"),
        "folder": str(tmp_path / "f"),
    }


def test_labels_are_optional(tmp_path: Path, files: Files, caplog: pytest.LogCaptureFixture) -> None:
    samples = {}
    for kind, where in bare(tmp_path, files).items():
        for known in (None, Classes({"A": 0, "b": 1}, "x")):
            images = opened(where, ClassChoice(), known=known)
            samples[kind] = images.sample(5, 1)
            assert samples[kind].labels.tolist() == [-1] * 5
            assert (images.class_to_idx, images.record.classes_source) == ({}, None)
    assert all(torch.equal(sample.images, samples["folder"].images) for sample in samples.values())
    assert "no labels: the images have no class names" in caplog.text


# What is refused


def test_kinds_that_are_not_known(tmp_path: Path, files: Files) -> None:
    (tmp_path / "x.bin").write_bytes(b"1")
    (tmp_path / "x.png").write_bytes(files["A/1.png"])
    for where, expected in {
        "x.bin": "cannot be read from such a file",
        "x.png": "cannot be read from such a file",
        "missing": "no such file or folder",
        "missing.tar": "no such file or folder",
        "missing.tar.gz": "no such file or folder",
        "*.tar": "no such file",
        "s-{0..2}.tar": "no such file",
        "s-{2..0}.tar": "this range has 0 files",
        "s-{0..999999999}.tar": "this range has",
        "x.*": "several files are tar files or Parquet files",
    }.items():
        with pytest.raises(InputError, match=expected) as caught:
            open_source(str(tmp_path / where))
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_tar_files_beside_class_folders_are_passed_over(tmp_path: Path, files: Files) -> None:
    where = Path(folder(tmp_path, files))
    write_tar(where / "backup.tar", files)
    found = open_source(where)
    assert isinstance(found, Found) and found.passed_over == {".tar": 1} and found.class_from == "first"


def test_pictures_are_read_alike_from_files_and_memory(tmp_path: Path) -> None:
    from ospq_export.data.pixels import read_picture

    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, kwargs in {
        "a.jpg": {"exif": exif},
        "a.tiff": {"compression": "tiff_lzw"},
        "b.tiff": {},
        "a.webp": {},
        "a.bmp": {},
    }.items():
        Image.fromarray(pixels).save(tmp_path / name, **kwargs)
        ours = read_picture(io.BytesIO((tmp_path / name).read_bytes()), "RGB", exif=True)
        theirs = read_picture(tmp_path / name, "RGB", exif=True)
        assert np.array_equal(np.asarray(ours[0]), np.asarray(theirs[0])) and ours[1] == theirs[1]
