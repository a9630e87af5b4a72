"""The datasets' YAML files against the official lists, and what is said of a YAML file that contradicts itself.

The lists are in ../shared/data/class_names (not part of the project); facts without a list are tables below.
"""

import json
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.dataset import Dataset
from configs.errors import UserError
from configs.load import as_settings, dataset_settings, known_datasets, resolve
from configs.schema import CONFIGS, Config
from tests.configs.test_schema import DATASET

NAMES = CONFIGS.parent.parent / "shared" / "data" / "class_names"
needs_names = pytest.mark.skipif(not NAMES.is_dir(), reason=f"no official name lists: {NAMES} is absent")

# name -> classes, images of train and val, folder, pixel values without a class
FACTS: dict[str, tuple[int, int, int, str, list[int]]] = {
    "coco-stuff": (171, 118287, 5000, "coco_stuff164k", [255]),
    "pascal-voc": (20, 10582, 1449, "VOCdevkit/VOC2012", [0, 255]),
    "pascal-context": (59, 4996, 5104, "VOCdevkit/VOC2010", [0]),
    "ade20k": (150, 20210, 2000, "ADEChallengeData2016", [0]),
    "pascal-voc-21": (21, 10582, 1449, "VOCdevkit/VOC2012", [255]),
    "pascal-context-60": (60, 4996, 5104, "VOCdevkit/VOC2010", [255]),
    "cityscapes": (19, 2975, 500, "cityscapes", [*range(7), 9, 10, 14, 15, 16, 18, 29, 30, 255]),
}
UNSEEN = {
    "coco-stuff": {
        19: "cow", 23: "giraffe", 28: "suitcase", 29: "frisbee", 36: "skateboard", 51: "carrot", 76: "scissors",
        88: "cardboard", 94: "clouds", 112: "grass", 133: "playingfield", 136: "river", 137: "road", 157: "tree",
        160: "wall-concrete",
    },
    "pascal-voc": {15: "pottedplant", 16: "sheep", 17: "sofa", 18: "train", 19: "tvmonitor"},
    "pascal-context": {
        0: "aeroplane", 6: "bird", 7: "boat", 14: "cat", 19: "cow", 24: "fence", 31: "keyboard", 33: "motorbike",
        48: "sofa", 54: "tvmonitor",
    },
    "pascal-voc-21": {0: "background", 16: "pottedplant", 17: "sheep", 18: "sofa", 19: "train", 20: "tvmonitor"},
    "pascal-context-60": {
        0: "background", 1: "aeroplane", 7: "bird", 8: "boat", 15: "cat", 20: "cow", 25: "fence", 32: "keyboard",
        34: "motorbike", 49: "sofa", 55: "tvmonitor",
    },
    "ade20k": {},
    "cityscapes": {},
}  # fmt: skip
FOR_EVALUATION = {"ade20k-847": 847, "ade20k-847-release": 847, "pascal-context-459": 459}  # classes; only val
COCO_RAW_UNSEEN = [20, 24, 32, 33, 40, 56, 86, 99, 105, 123, 144, 147, 148, 168, 171]
COCO_DROPPED = [11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90]
CITYSCAPES = {  # the official ids of the evaluated classes
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19,
    "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26, "truck": 27,
    "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33,
}  # fmt: skip


def read(name: str) -> Dataset:
    return resolve(dataset=name).dataset


def numbered(file: str) -> dict[int, str]:
    """Lines "3: name" of an official list."""
    pairs = [line.split(":") for line in (NAMES / file).read_text().splitlines() if ":" in line]
    return {int(number): name.strip() for number, name in pairs}


def json_names(file: str) -> list[str]:
    return [name.strip() for name in json.loads((NAMES / file).read_text())]


def ade_names() -> list[list[str]]:
    """The synonyms of each of the 150 classes."""
    lines = (NAMES / "ade20k_objectInfo150.txt").read_text().splitlines()[1:]
    return [[name.strip() for name in line.split("\t")[-1].split(",")] for line in lines]


def coco_names() -> dict[int, str]:
    """Pixel value -> name, of the official 182."""
    return {number - 1: name for number, name in numbered("cocostuff_labels_182_official.txt").items() if number}


def test_all_are_known() -> None:
    assert set(known_datasets()) == {*FACTS, *FOR_EVALUATION, "scenes"} and set(FACTS) == set(UNSEEN)


@pytest.mark.parametrize("name", FACTS)
def test_facts(name: str) -> None:
    dataset, (classes, train, val, root, ignored) = read(name), FACTS[name]
    assert (dataset.name, dataset.root, len(dataset.classes)) == (name, root, classes)
    assert {key: split.count for key, split in dataset.splits.items()} == {"train": train, "val": val}
    assert sorted(dataset.ignore_index) == ignored
    assert {index: dataset.classes[index] for index in dataset.unseen_indices} == UNSEEN[name]
    assert len(dataset.seen_indices) == classes - len(UNSEEN[name])


@pytest.mark.parametrize("name", FACTS)
def test_values_without_a_class_are_no_class(name: str) -> None:
    """In the coding of the dataset, which comes first; train and val are coded alike."""
    dataset = read(name)
    values = dataset.value_of_class(None)
    assert len(set(values)) == len(dataset.classes) and not set(values) & set(dataset.ignore_index)
    train, val = ([masks.values for masks in dataset.splits[key].masks] for key in ("train", "val"))
    assert train[: len(val)] == val and train[0] is None


@pytest.mark.parametrize("name", known_datasets())
def test_settings_come_back(name: str) -> None:
    """As a cache's manifest holds them."""
    config = resolve(dataset=name)
    assert Config.model_validate(json.loads(json.dumps(as_settings(config)))) == config


@pytest.mark.parametrize("name", known_datasets())
def test_files_say_what_to_expect(name: str) -> None:
    lines = (CONFIGS / "datasets" / f"{name}.yaml").read_text().splitlines()
    assert lines[0].startswith("# ") and max(map(len, lines)) <= 120


@needs_names
def test_coco_stuff_names() -> None:
    """171 of the official 182, in their order; the other 11 are those that COCO dropped."""
    official = coco_names()
    assert sorted(official) == list(range(182))
    assert list(read("coco-stuff").classes) == [n for value, n in official.items() if value not in COCO_DROPPED]
    assert list(read("coco-stuff").classes) == json_names("catseg_coco.json")


@needs_names
def test_coco_stuff_values() -> None:
    """Of both codings, by name."""
    dataset, value_of = read("coco-stuff"), {name: value for value, name in coco_names().items()}
    raw, converted = (dataset.value_of_class(masks.values) for masks in dataset.splits["train"].masks)
    assert raw == [value_of[name] for name in dataset.classes]
    assert set(range(182)) - set(raw) == set(COCO_DROPPED)
    assert converted == list(range(171))
    assert [raw[index] for index in dataset.unseen_indices] == COCO_RAW_UNSEEN


@needs_names
def test_voc_names() -> None:
    names = list(read("pascal-voc").classes)
    assert names == json_names("catseg_voc20.json")
    lines = [line.split("\t") for line in (NAMES / "voc12_labels.txt").read_text().splitlines()]
    value_of = {name: int(value) for value, name in lines}
    assert read("pascal-voc").value_of_class(None) == [value_of[name] for name in names]


@needs_names
def test_context_names() -> None:
    """The 59 are in the order of the 459 original labels, where the dining table is any table."""
    dataset = read("pascal-context")
    assert list(dataset.classes) == json_names("catseg_pc59.json")
    original = {name: number for number, name in numbered("pascal_context_classes-400_fcn.txt").items()}
    numbers = [original["table" if name == "diningtable" else name] for name in dataset.classes]
    assert len(original) == 459 and numbers == sorted(numbers)
    assert dataset.value_of_class(None) == list(range(1, 60))


@pytest.mark.parametrize("name", FOR_EVALUATION)
def test_many_classes(name: str) -> None:
    dataset = read(name)
    assert len(dataset.classes) == FOR_EVALUATION[name] and not dataset.unseen
    assert {key: split.count for key, split in dataset.splits.items()} == {"val": 5104 if "459" in name else 2000}


@needs_names
def test_ade20k_847_names() -> None:
    """The first synonym of each in the open-vocabulary test, or all, where two have the same."""
    official = json_names("catseg_ade847.json")
    firsts = [synonyms.split(", ")[0] for synonyms in official]
    wanted = [first if firsts.count(first) == 1 else all_ for first, all_ in zip(firsts, official, strict=True)]
    assert list(read("ade20k-847").classes) == list(read("ade20k-847-release").classes) == wanted
    numbers = read("ade20k-847-release").value_of_class(None)
    # Of classes 0, 1, 2, 50, 100 and 846, from Mask2Former's table.
    assert [numbers[index] for index in (0, 1, 2, 50, 100, 846)] == [2978, 312, 2420, 294, 308, 3148]


@needs_names
def test_context_459_names() -> None:
    assert list(read("pascal-context-459").classes) == list(numbered("pascal_context_classes-400_fcn.txt").values())


@needs_names
def test_names_with_background() -> None:
    """Background first; VOC's is any of the words that CAT-Seg's test has beside VOC's classes."""
    voc, context = read("pascal-voc-21"), read("pascal-context-60")
    assert list(voc.classes) == ["background", *read("pascal-voc").classes]
    assert list(context.classes) == ["background", *read("pascal-context").classes]
    with_background = json_names("catseg_voc20b.json")
    assert with_background[:20] == list(voc.classes[1:])
    assert voc.channels == [
        *((0, (word,)) for word in with_background[20:]),
        *((index, (name,)) for index, name in enumerate(voc.classes) if index),
    ]
    assert voc.value_of_class(None) == list(range(21)) and context.value_of_class(None) == list(range(60))
    assert voc.templates == read("pascal-voc").templates and context.templates == read("pascal-context").templates


@needs_names
def test_context_splits() -> None:
    """The numbers of cascade-clip, read in the order that has VOC's classes first, are the split zs3."""
    splits = read("pascal-context").unseen_splits
    voc_first = numbered("pascal_context_59_fcn.txt")
    cascade = [0, 2, 3, 7, 9, 13, 17, 19, 31, 37]
    assert {voc_first[index + 1] for index in cascade} == set(splits["zs3"])
    assert [json_names("catseg_pc59.json")[index] for index in cascade] == list(splits["cascade-clip"])


@pytest.mark.parametrize(
    ("name", "split", "count"), [("pascal-context", "cascade-clip", 10), ("coco-stuff", "zegclip", 15)]
)
def test_unseen_split_by_set(name: str, split: str, count: int) -> None:
    """Also on top of what a cache holds."""
    chosen = resolve(dataset=name, assignments=[f"dataset.unseen={split}"]).dataset
    assert chosen.unseen == chosen.unseen_splits[split] and len(chosen.unseen_indices) == count
    held = as_settings(resolve(dataset=name, assignments=["dataset.unseen=[]"]).stage_one)
    assert resolve(base=held).dataset.unseen == ()
    assert resolve(base=held, assignments=[f"dataset.unseen={split}"]).dataset == chosen


@needs_names
def test_ade20k_names() -> None:
    """Those of the open-vocabulary test; each is among the official synonyms, and all but one come first there."""
    dataset, official = read("ade20k"), ade_names()
    assert list(dataset.classes) == json_names("catseg_ade150.json")
    assert [name in synonyms for name, synonyms in zip(dataset.classes, official, strict=True)] == [True] * 150
    other = [name for name, synonyms in zip(dataset.classes, official, strict=True) if name != synonyms[0]]
    assert other == ["television receiver"]
    assert dataset.value_of_class(None) == list(range(1, 151))


def test_cityscapes_values() -> None:
    """The evaluated classes have their official ids, every other id has no class."""
    dataset = read("cityscapes")
    assert dict(zip(dataset.classes, dataset.value_of_class(None), strict=True)) == CITYSCAPES
    assert {*CITYSCAPES.values(), *dataset.ignore_index} == {*range(34), 255}
    converted = dataset.splits["train"].masks[1]
    assert converted.files.endswith("_labelTrainIds.png") and dataset.value_of_class(converted.values) == list(
        range(19)
    )


def test_prompts() -> None:
    """Names that run words together are prompted apart, but for VOC's, which ZegCLIP prompts with as they are."""
    apart = {"diningtable": ("dining table",), "pottedplant": ("potted plant",), "tvmonitor": ("tv monitor",)}
    for name in FACTS:
        dataset = read(name)
        spaced = {key: value for key, value in apart.items() if key in dataset.classes}
        if name != "pascal-voc-21":
            assert dataset.prompts == ({} if name == "pascal-voc" else spaced)
            names = [dataset.prompts.get(key, (key,)) for key in dataset.classes]
            assert dataset.channels == list(enumerate(names))
    assert read("pascal-voc").templates == ("a photo of a {}",)
    assert read("coco-stuff").templates == "zegclip"


# A file that contradicts itself: what differs from DATASET -> the message after the file's name.

SPLIT = {"images": "i/{id}.jpg", "masks": "m/{id}.png"}
PATTERN = "must contain {id} once, no other braces, and * only as a final .*"
NUMBERS = "write numbers and ranges such as 0-10, 12, or a list of distinct colours"
VALUE = "write a number from 0 to 65535, or a colour such as [128, 0, 64]"
RANGE = "must be between 0 and 65535, without duplicates, and ranges ascending"
NAME = "must not be empty, have outer spaces, or contain | or a line break"
QUOTES = ", not as text: put it in quotes"


def split(**changes: Any) -> dict[str, Any]:
    return {"splits": {"train": SPLIT, "val": SPLIT | changes}}


FAULTS: list[tuple[dict[str, Any], str]] = [
    (split(images="i/all.jpg"), f"setting splits.val: 'i/all.jpg' {PATTERN}"),
    (split(images="{id}/{id}.jpg"), f"setting splits.val: '{{id}}/{{id}}.jpg' {PATTERN}"),
    (split(images="{city}/{id}.jpg"), f"setting splits.val: '{{city}}/{{id}}.jpg' {PATTERN}"),
    (split(images="{}/{id}.jpg"), f"setting splits.val: '{{}}/{{id}}.jpg' {PATTERN}"),
    (split(images="*/{id}.jpg"), f"setting splits.val: '*/{{id}}.jpg' {PATTERN}"),
    (split(images="{id}*"), f"setting splits.val: '{{id}}*' {PATTERN}"),
    (split(masks="m/{id}.*.*"), f"setting splits.val: 'm/{{id}}.*.*' {PATTERN}"),
    (split(masks=["m/{id}.png", "m/all.png"]), f"setting splits.val: 'm/all.png' {PATTERN}"),
    (split(masks={"files": "m.png", "values": "0-3"}), f"setting splits.val: 'm.png' {PATTERN}"),
    (split(masks={"file": "m/{id}.png"}), "setting splits.val.masks.0.files is missing"),
    (
        split(masks={"files": "m/{id}.png", "value": "0-3"}),
        "unknown setting splits.val.masks.0.value; did you mean 'splits.val.masks.0.values'?",
    ),
    (
        split(masks=["m/{id}.png", {"files": "n/{id}.png", "values": "0-3x"}]),
        f"setting splits.val.masks.1.values: values '0-3x': {NUMBERS} (it is '0-3x')",
    ),
    (
        split(masks={"files": "n/{id}.png", "values": "0-4"}),
        "values 0-4 has 5 values for 4 classes",
    ),
    (split(image="x"), "unknown setting splits.val.image; did you mean 'splits.val.images'?"),
    (split(count=0), "setting splits.val.count: Input should be greater than 0 (it is 0)"),
    ({"unseen": "zs3"}, "unseen 'zs3' is not in unseen_splits (there are none)"),
    (
        {"unseen": "zs", "unseen_splits": {"zs3": ["a"], "spnet": ["b"]}},
        "unseen 'zs' is not in unseen_splits (spnet, zs3)",
    ),
    ({"classes": ["a", "b", "a", "d", "d"]}, "classes lists 'a' twice"),
    (
        {"classes": ["cow", "tree"], "unseen": ["cows", "x"]},
        "unseen lists names that are not classes of the dataset: cows, x; did you mean 'cow'?",
    ),
    ({"unseen": ["a", "qqq"]}, "unseen lists names that are not classes of the dataset: qqq"),
    (
        {"classes": ["cow", "tree"], "unseen": [], "prompts": {"trees": ["tree"]}},
        "prompts lists names that are not classes of the dataset: trees; did you mean 'tree'?",
    ),
    ({"unseen_splits": {"few": ["qqq"]}}, "unseen_splits.few lists names that are not classes of the dataset: qqq"),
    ({"unseen": ["a", "b", "c", "d"]}, "at least one class must be seen"),
    ({"unseen": "all", "unseen_splits": {"all": ["a", "b", "c", "d"]}}, "at least one class must be seen"),
    ({"classes": [], "unseen": []}, "at least one class must be seen"),
    (
        {"classes": [f"c{index}" for index in range(65536)], "unseen": []},
        "16-bit masks can hold at most 65,535 classes",
    ),
    ({"templates": ["a {}", "a"]}, "give one or more templates, each with {} for the class name"),
    ({"values": "0-2"}, "values 0-2 has 3 values for 4 classes"),
    (
        {"values": "0-2, 1"},
        f"setting values: values '0-2, 1' {RANGE} (it is '0-2, 1')",
    ),
    (
        {"values": "65533-65536"},
        f"setting values: values '65533-65536' {RANGE} (it is '65533-65536')",
    ),
    ({"values": "3-0"}, f"setting values: values '3-0' {RANGE} (it is '3-0')"),
    ({"values": "none"}, f"setting values: values 'none': {NUMBERS} (it is 'none')"),
    ({"values": 3}, "values 3 has 1 values for 4 classes"),
    ({"classes": ["a", True]}, f"setting classes.1: YAML reads this as yes, no, true or false{QUOTES} (it is True)"),
    ({"classes": ["a", 7]}, f"setting classes.1: YAML reads this as a number{QUOTES} (it is 7)"),
    ({"classes": ["a", None]}, f"setting classes.1: YAML reads this as nothing{QUOTES}"),
    ({"classes": ["a", date(2020, 1, 1)]}, f"setting classes.1: YAML reads this as a date{QUOTES}"),
    ({"unseen": [False]}, f"setting unseen.0: YAML reads this as yes, no, true or false{QUOTES} (it is False)"),
    ({"prompts": {"a": ["a", 1.5]}}, f"setting prompts.a.1: YAML reads this as a number{QUOTES} (it is 1.5)"),
    ({"name": 2012}, f"setting name: YAML reads this as a number{QUOTES} (it is 2012)"),
    ({"classes": 5}, "setting classes: Input should be a list (it is 5)"),
    (
        {"classes": ["car|truck", "a"]},
        f"classes: the name 'car|truck' {NAME}",
    ),
    ({"classes": ["sky ", "a"]}, f"classes: the name 'sky ' {NAME}"),
    ({"classes": ["", "a"]}, f"classes: the name '' {NAME}"),
    ({"classes": ["a\tb", "a"]}, f"classes: the name 'a\\tb' {NAME}"),
    ({"prompts": {"a": ["a", " "]}}, f"prompts.a: the name ' ' {NAME}"),
    (
        {"prompts": {"a": ["x|y"]}},
        f"prompts.a: the name 'x|y' {NAME}",
    ),
    ({"values": "0-3", "ignore_index": [7, 2]}, "2 is in values and in ignore_index: drop it from one of them"),
    ({"ignore_index": 65536}, f"setting ignore_index.0: {VALUE} (it is 65536)"),
    ({"prompts": {"a": {"any": "b"}}}, "setting prompts.a.any: Input should be a list (it is 'b')"),
    (
        {"coding": "ade20k", "values": ["#000000", "#000001", "#000002", "#000003"]},
        "with coding ade20k, values are numbers, not colours",
    ),
    ({"ignore_index": "other"}, f"setting ignore_index.0: {VALUE} (it is 'other')"),
    ({"prompts": {"a": {"any": []}}}, "each class in prompts needs at least one name"),
    ({"prompts": {"a": {"any": ["b|c"]}}}, f"prompts.a: the name 'b|c' {NAME}"),
    ({"prompts": {"a": {"anyof": ["b"]}}}, "setting prompts.a.any is missing"),
    ({"prompts": {"a": {"any": ["b"], "all": ["c"]}}}, "unknown setting prompts.a.all"),
    ({"prompts": {"a": 5}}, "setting prompts.a: Input should be a list (it is 5)"),
    ({"prompts": {"a": {"any": ["b", 7]}}}, f"setting prompts.a.any.1: YAML reads this as a number{QUOTES} (it is 7)"),
    ({"ignore_index": [0, -1]}, f"setting ignore_index.1: {VALUE} (it is -1)"),
]


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("changes", "message"), FAULTS)
def test_a_file_that_contradicts_itself(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(DATASET | changes))
    assert refusal(lambda: dataset_settings(str(path))) == f"{path}: {message}"
    assert refusal(lambda: resolve(dataset=str(path))) == f"{path}: {message}"


@pytest.mark.parametrize("key", ["masks", "images"])
def test_a_split_without_patterns(key: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(DATASET | {"splits": {"train": {k: v for k, v in SPLIT.items() if k != key}}}))
    assert refusal(lambda: dataset_settings(str(path))).startswith(f"{path}: setting splits.train.{key}")


@pytest.mark.parametrize(
    "changes",
    [
        split(images="i/{id}}.jpg"),  # another brace
        {"templates": []},  # no prompt at all
        {"prompts": {"a": []}},  # no prompt for a class
        {"unseen": "few", "unseen_splits": ["few"]},  # names without classes
    ],
)
def test_more_faults(changes: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(DATASET | changes))
    refusal(lambda: dataset_settings(str(path)))


@pytest.mark.parametrize("text", ["a\nb\nc\nd\n", "a\nb\nc\nd", "\n a\r\nb \r\n\r\n\tc\n\n\nd\n\n"])
def test_classes_in_a_file_of_their_own(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the YAML file, wherever the command runs; a cache holds the names themselves."""
    (tmp_path / "names.txt").write_bytes(text.encode())
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(DATASET | {"classes": "names.txt"}))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = resolve(dataset=str(path))
    assert config == Config.model_validate({"dataset": DATASET})
    assert as_settings(config.stage_one)["dataset"]["classes"] == ["a", "b", "c", "d"]


def test_names_with_spaces_and_accents(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("traffic light\ncafé\n鳥\n", encoding="utf-8")
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(DATASET | {"classes": "names.txt", "unseen": ["café"]}, allow_unicode=True))
    assert resolve(dataset=str(path)).dataset.classes == ("traffic light", "café", "鳥")


@pytest.mark.parametrize(
    ("content", "message"), [("a\nb\na\n", "classes lists 'a' twice"), ("\n", "at least one class")]
)
def test_a_wrong_file_of_names(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text(content)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(DATASET | {"classes": "names.txt", "unseen": []}))
    assert refusal(lambda: resolve(dataset=str(path))).startswith(f"{path}: {message}")


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00a"])
def test_no_file_of_names(content: bytes | None, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    if content is not None:
        names.write_bytes(content)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(DATASET | {"classes": "names.txt"}))
    line = refusal(lambda: resolve(dataset=str(path)))
    assert f"the class names in {names}" in line
