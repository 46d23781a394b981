"""The classes' numbers: maps in all their forms, orders, timm's tables, and what is refused."""

import logging
from pathlib import Path

import numpy as np
import pytest
import timm.data

from ospq_export.data import ClassChoice, Classes, known_classes, number_classes
from ospq_export.data.class_map import read_class_map
from ospq_export.data.folders import Scan
from ospq_export.data.sources import stratified
from ospq_export.errors import InputError

LETTERS = {"cat": 0, "dog": 1, "emu": 2}


def folders(*names: str) -> Scan:
    return Scan(Path("data"), [f"{n}/1.png" for n in names], list(names), list(names), class_from="first")


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# Class maps


@pytest.mark.parametrize(
    "text",
    [
        "cat\ndog\nemu",
        "cat\r\ndog\r\nemu\r\n\r\n",
        "\ufeffcat\ndog\nemu\n\n\n",
        "0,cat\n1,dog\n2,emu\n",
        "index,name\r\n2,emu\r\n0,cat\r\n1,dog\r\n",
        "cat,0\ndog, 1\nemu ,2",
        '"cat";0\n"dog";1\n"emu";2',
        "0 cat\n1 dog\n2 emu",
        "0\tcat\n1\tdog\n2\temu",
        "emu 2\ncat 0\ndog 1",
        '["cat", "dog", "emu"]',
        '{"emu": 2, "cat": 0, "dog": 1}',
        '{"0": "cat", "1": "dog", "2": "emu"}',
        '\ufeff{"cat": "0", "dog": "1", "emu": "2"}\r\n',
    ],
)
def test_forms_of_a_class_map(tmp_path: Path, text: str) -> None:
    assert read_class_map(written(tmp_path / "map.txt", text)) == LETTERS
    assert read_class_map(written(tmp_path / "map.txt", text.lstrip("\ufeff").encode("utf-16"))) == LETTERS


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("class 1\nclass 2\nclass 3", ["class 1", "class 2", "class 3"]),
        ("10\n1\n2", ["10", "1", "2"]),
        ("0,tench, Tinca tinca\n1,goldfish", ["tench, Tinca tinca", "goldfish"]),
        ("tench, Tinca tinca\ngoldfish, gold", ["tench, Tinca tinca", "goldfish, gold"]),
        ('{"10": 0, "1": 1, "2": 2}', ["10", "1", "2"]),
        ('{"0": "10", "1": "1", "2": "2"}', ["10", "1", "2"]),
        ('{"5": "0", "7": "1"}', ["5", "7"]),
        ("0,10\n1,1\n2,2", ["10", "1", "2"]),
        ("cafe\u0301\nb", ["caf\u00e9", "b"]),
    ],
)
def test_names_that_look_like_something_else(tmp_path: Path, text: str, names: list[str]) -> None:
    assert read_class_map(written(tmp_path / "map", text)) == {name: i for i, name in enumerate(names)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat\ndog\ncat", "'cat' twice"),
        ('{"cat": 0, "cat": 1}', "'cat' twice"),
        ("0,cat\n1,dog\n1,emu", "index 1 to 'dog' and 'emu'"),
        ("0,cat\n1,dog\n3,emu", r"no index 2, but 'emu' \(3\)"),
        ("1 cat\n2 dog\n3 emu", r"no index 0, but 'emu' \(3\)"),
        ('{"1": "cat", "2": "dog"}', r"no index 0, but 'dog' \(2\)"),
        ('{"cat": 0, "dog": -1}', r"'dog' \(-1\)"),
        ("cat\n\ndog", "empty line 2"),
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("[1, 2]", "neither a list"),
        ("[]", "neither a list"),
        ('{"cat": true, "dog": 1}', "neither a name nor an index"),
        ('{"0": ["n01440764", "tench"]}', "neither a name nor an index"),
        ('{"0": "1", "1": "2", "2": "0"}', "numbers on both sides"),
        ('{"cat": "dog"}', "neither column"),
        ('["cat", ', "not JSON"),
        (b"\xff\xfe\xfd", "not UTF-8"),
    ],
)
def test_class_maps_that_are_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_class_map(written(tmp_path / "map.txt", text))
    assert "`class_map`" in str(caught.value)


def test_a_class_map_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            read_class_map(path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cat", "dog"], "3 classes|index 2 is missing"),
        (["cat", "dog", "emu", "fox"], "surplus: fox"),
        (["cat", "dog", "fox"], r"not among .* classes \(class_map=.*emu"),
        (["cat", "dog", "Emu"], "a class is called 'Emu'"),
    ],
)
def test_a_map_has_to_fit_network_and_folders(tmp_path: Path, names: list[str], message: str) -> None:
    choice = ClassChoice(written(tmp_path / "map.txt", "\n".join(names)))
    with pytest.raises(InputError, match=message):
        number_classes(folders("cat", "dog", "emu"), choice, 3)


def test_a_map_may_name_classes_without_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path / "map.txt", "cat\ndog\nemu")
    with caplog.at_level(logging.WARNING):
        found = number_classes(folders("emu"), ClassChoice(path), 3)
    assert (found.indices, found.source) == (LETTERS, f"class_map={path}")
    assert "2 of 3 classes have no folder" in caplog.text


def test_map_and_order_together(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="both given"):
        ClassChoice(tmp_path / "map.txt", "plain")


# Orders

TEN = [str(number) for number in range(1, 11)]


@pytest.mark.parametrize(
    ("names", "plain", "natural"),
    [
        (TEN, ["1", "10", *TEN[1:9]], TEN),
        (["a", "B"], ["B", "a"], ["a", "B"]),
        (["c9", "c10"], ["c10", "c9"], ["c9", "c10"]),
    ],
)
def test_two_orders_are_refused_or_chosen(names: list[str], plain: list[str], natural: list[str]) -> None:
    with pytest.raises(InputError, match=r"`class_map` FILE.*`class_order`") as caught:
        number_classes(folders(*names), ClassChoice(), len(names))
    message = str(caught.value)
    assert f"plain (torchvision) {', '.join(plain)}; natural (timm) {', '.join(natural)}" in message
    for order, expected in (("plain", plain), ("natural", natural)):
        found = number_classes(folders(*names), ClassChoice(order=order), len(names))  # type: ignore[arg-type]
        assert list(found.indices) == expected
        assert found.source == f"class_order={order}"


def test_long_orders_are_shown_where_they_part() -> None:
    names = [f"a{number:03}" for number in range(300)] + ["b9", "b10"]
    with pytest.raises(
        InputError, match=r"plain \(torchvision\) \.\.\., b10, b9; natural \(timm\) \.\.\., b9"
    ):
        number_classes(folders(*names), ClassChoice(), len(names))


def test_equal_orders_need_no_word(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        found = number_classes(folders("emu", "dog", "cat"), ClassChoice(), 3)
    assert dict(found.indices) == LETTERS
    assert found.source == "folders, plain and natural order agree"
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("A", "a"), "does not tell 'A' from 'a'"),
        (("01", "1"), "does not tell '01' from '1'"),
        (("caf\u00e9", "cafz"), "stored apart"),
    ],
)
def test_orders_that_depend_on_more_than_the_name(names: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        number_classes(folders(*names), ClassChoice(), 2)
    assert list(number_classes(folders(*names), ClassChoice(order="plain"), 2).indices) == sorted(names)


def test_natural_order_with_ties_is_refused() -> None:
    with pytest.raises(InputError, match="does not tell 'A' from 'a'"):
        number_classes(folders("a", "A"), ClassChoice(order="natural"), 2)


@pytest.mark.parametrize("order", [None, "plain"])
def test_another_number_of_folders_than_outputs(order: str | None, caplog: pytest.LogCaptureFixture) -> None:
    choice, scan = ClassChoice(order=order), folders("cat", "dog")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="2 class folders and 3 classes of the network"):
        number_classes(scan, choice, 3)
    with caplog.at_level(logging.WARNING):
        assert number_classes(scan, choice, 3, needed=False) == Classes()
    assert "keeps no class names" in caplog.text


def test_one_output_tells_two_classes_apart() -> None:
    assert dict(number_classes(folders("no", "yes"), ClassChoice(), 1).indices) == {"no": 0, "yes": 1}


def test_no_class_folders(caplog: pytest.LogCaptureFixture) -> None:
    scan = Scan(Path("data"), ["1.png"], [""], [])
    for found in (
        number_classes(scan, ClassChoice(), 3),
        known_classes(scan, ClassChoice(), Classes(LETTERS, "x")),
    ):
        assert found == Classes()
    assert caplog.text.count("no labels") == 2


# WordNet ids


@pytest.mark.parametrize(
    ("outputs", "table", "expected"),
    [
        (1000, "imagenet-1k", [1, 281, 574]),
        (11821, "imagenet-12k", None),
        (11221, "imagenet-21k-miil", None),
        (21841, "imagenet-22k", None),
        (21842, "imagenet-22k-ms", [1, 281, 574]),
        (21843, "imagenet-21k-goog", None),
        (10450, "imagenet-21k-miil-w21", None),
    ],
)
def test_wordnet_ids(outputs: int, table: str, expected: list[int] | None) -> None:
    scan = folders("n01443537", "n02123045", "n03445777")
    found = number_classes(scan, ClassChoice(), outputs)
    assert found.source == f"timm's table {table}"
    assert len(found.indices) == outputs
    numbers = [found.indices[name] for name in scan.names]
    if expected is None:
        info = Path(timm.data.__file__).parent / "_info"
        files = {path.name: path.read_text().split() for path in info.glob("imagenet*_synsets.txt")}
        assert [
            [ids.index(name) for name in scan.names] for ids in files.values() if len(ids) == outputs
        ] == [numbers]
    else:
        assert numbers == expected


def test_a_wordnet_id_that_the_table_lacks() -> None:
    for needed in (True, False):
        with pytest.raises(InputError, match="n99999999"):
            number_classes(folders("n01443537", "n99999999"), ClassChoice(), 1000, needed=needed)
    with pytest.raises(InputError, match="no WordNet ids: misc"):
        number_classes(folders("n01443537", "n02123045", "misc"), ClassChoice(), 1000)


def test_wordnet_ids_of_a_network_of_its_own() -> None:
    scan = folders("n03445777", "n01440764")
    assert dict(number_classes(scan, ClassChoice(), 2).indices) == {"n01440764": 0, "n03445777": 1}
    with pytest.raises(InputError, match="2 class folders and 10 classes"):
        number_classes(scan, ClassChoice(), 10)


# A run's classes


def test_options_have_to_agree_with_the_run(tmp_path: Path) -> None:
    run = Classes({"9": 0, "10": 1}, "class_order=natural")
    scan = folders("10", "9")
    same, other = written(tmp_path / "same", "9\n10"), written(tmp_path / "other", "10\n9")
    for choice in (ClassChoice(), ClassChoice(same), ClassChoice(order="natural")):
        assert known_classes(scan, choice, run) == run
    for choice in (ClassChoice(other), ClassChoice(order="plain")):
        with pytest.raises(InputError, match=r"class '9' is 0 in the run and 1 there \(class_order=natural"):
            known_classes(scan, choice, run)
    with pytest.raises(InputError, match="not among the run's 2 classes"):
        known_classes(folders("9", "11"), ClassChoice(), run)


def test_runs_of_earlier_versions_were_numbered_by_a_guess(caplog: pytest.LogCaptureFixture) -> None:
    old, scan = Classes({"9": 0, "10": 1}), folders("9", "10")
    with caplog.at_level(logging.WARNING):
        assert known_classes(scan, ClassChoice(), old) == old
        assert "did not ask" in caplog.text
        assert dict(known_classes(scan, ClassChoice(order="plain"), old).indices) == {"10": 0, "9": 1}
    caplog.clear()
    for names in (["cat", "dog"], ["Trouser", "Bag"]):
        known_classes(folders(*names), ClassChoice(), Classes({name: i for i, name in enumerate(names)}))
    assert caplog.text == ""


# Samples


@pytest.mark.parametrize("count", [1, 7, 83, 200, 399])
def test_a_sample_has_every_classs_share(count: int) -> None:
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(10), [10, 20, 30, 40, 50, 40, 30, 60, 70, 50]).astype(np.int64)
    for arrangement in (labels, rng.permutation(labels)):
        chosen = stratified(arrangement, count, 0)
        assert len(set(chosen.tolist())) == count
        assert (np.diff(chosen) > 0).all()
        quota = np.bincount(labels) * count / len(labels)
        assert (np.abs(np.bincount(arrangement[chosen], minlength=10) - quota) < 1).all()
        assert (chosen == stratified(arrangement, count, 0)).all()
    assert not np.array_equal(stratified(labels, count, 0), stratified(labels, count, 1))


def test_a_sample_of_unlabelled_images_is_spread() -> None:
    chosen = stratified(np.full(1000, -1, np.int64), 100, 0)
    assert len(chosen) == 100 and 400 < chosen.mean() < 600
