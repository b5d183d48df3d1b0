"""Data that cannot be used: the error names the file and the flag that mends it. And a study's progress."""

from __future__ import annotations

import gc
import sys
import warnings
from pathlib import Path

import datasets
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from image.data import DataError, load_images, make_dataset
from studies.progress import Progress
from translation.data import DataError as TextError
from translation.data import load_corpus

PICTURE = Image.new("RGB", (8, 8), (40, 180, 90))
CLASSES = datasets.ClassLabel(names=["cat", "dog"])


def class_folders(folder, classes=("cat", "dog"), size=8):
    for split in ("train", "test"):
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for index in range(2):
                PICTURE.resize((size, size)).save(folder / split / name / f"{index}.png")
    return folder


def table(folder, columns, features):
    """Both splits as Parquet."""
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    for split in ("train", "test"):
        rows.to_parquet(folder / f"{split}.parquet")
    return str(folder)


# ---- images ----


@pytest.mark.parametrize("size", [8, 100])
@pytest.mark.parametrize("content", [b"", b"no picture", None], ids=["empty", "text", "cut"])
def test_a_broken_image_is_named(tmp_path, size, content):
    """Small images are decoded at the start, large ones when asked for."""
    path = class_folders(tmp_path, size=size) / "test" / "dog" / "1.png"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content is None else content)
    sets = load_images(str(tmp_path))
    words = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            list(map(make_dataset(sets.test, sets).__getitem__, range(4)))
        except DataError as error:
            words = str(error)
        gc.collect()  # the file that Pillow leaves open
    assert "image_column must hold images that can be decoded, got row 3 of 'image'" in words
    assert str(path) in words
    assert words.endswith("or set --image_column or --dataset_name.")


def test_an_empty_parquet_file_is_named(tmp_path):
    table(tmp_path, {"image": [PICTURE] * 2, "label": [0, 1]}, {"image": datasets.Image(), "label": CLASSES})
    (tmp_path / "test.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"test\.parquet', which is none .*set --test_split or --dataset_name"):
        load_images(str(tmp_path))
    none = datasets.Dataset.from_dict(
        {"image": [], "label": []}, features=datasets.Features({"image": datasets.Image(), "label": CLASSES})
    )
    none.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"train_split must hold images, got .*train\.parquet', which has no rows"):
        load_images(str(tmp_path))


def test_folders_without_images(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "cat").mkdir(parents=True)
        (tmp_path / split / "cat" / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"train', whose folders \['cat'\] hold none. .* set --train_split or"):
        load_images(str(tmp_path))


def test_one_class_is_refused(tmp_path):
    """Of folders, and of a column that could have two."""
    with pytest.raises(DataError, match=r"label_column must hold two classes or more, got .*'cat' alone. Set --label"):
        load_images(str(class_folders(tmp_path / "folders", ("cat",))))
    (tmp_path / "rows").mkdir()
    features = {"image": datasets.Image(), "label": CLASSES}
    folder = table(tmp_path / "rows", {"image": [PICTURE] * 2, "label": [1, 1]}, features)
    with pytest.raises(DataError, match="'dog' alone"):
        load_images(folder)


def test_columns_are_found_by_their_types(tmp_path):
    features = {"picture": datasets.Image(), "kind": CLASSES, "image": datasets.Value("string")}
    folder = table(tmp_path, {"picture": [PICTURE] * 2, "kind": [0, 1], "image": ["a", "b"]}, features)
    sets = load_images(folder)
    assert (sets.image_column, sets.label_column, sets.label_names) == ("picture", "kind", ["cat", "dog"])


def test_the_usual_names_win(tmp_path):
    features = {
        "image": datasets.Image(),
        "other": datasets.Image(),
        "label": datasets.Value("int64"),
        "kind": CLASSES,
    }
    columns = {"image": [PICTURE] * 2, "other": [PICTURE] * 2, "label": [0, 1], "kind": [1, 0]}
    sets = load_images(table(tmp_path, columns, features))
    assert (sets.image_column, sets.label_column, sets.label_names) == ("image", "label", ["0", "1"])


@pytest.mark.parametrize("flag", ["image_column", "label_column"])
def test_two_columns_of_the_type_name_the_flag(tmp_path, flag):
    features = {"a": datasets.Image(), "b": datasets.Image(), "c": CLASSES, "d": CLASSES}
    columns = {"a": [PICTURE] * 2, "b": [PICTURE] * 2, "c": [0, 1], "d": [0, 1]}
    given = {"image_column": "a", "label_column": "c"}
    folder, others = table(tmp_path, columns, features), {name: given[name] for name in given if name != flag}
    with pytest.raises(DataError, match=rf"{flag} must be one of the columns .* 2 columns .*Set --{flag}"):
        load_images(folder, **others)
    assert load_images(folder, **given).label_column == "c"


# ---- sentences ----


@pytest.mark.parametrize(("split", "flag"), [("train", "train_split"), ("validation", "validation_set")])
@pytest.mark.parametrize("ending", ["de", "jsonl", "parquet"])
def test_an_empty_file_of_sentences_is_named(tmp_path, split, flag, ending):
    for name in ("train", "validation", "test"):
        if ending == "de":
            (tmp_path / f"{name}.en").write_text("one\ntwo\n")
            (tmp_path / f"{name}.de").write_text("eins\nzwei\n")
        else:
            rows = datasets.Dataset.from_dict({"en": ["one"], "de": ["eins"]})
            getattr(rows, {"jsonl": "to_json", "parquet": "to_parquet"}[ending])(tmp_path / f"{name}.{ending}")
    assert len(load_corpus(str(tmp_path)).train) in (1, 2)
    (tmp_path / f"{split}.{ending}").write_bytes(b"")
    with pytest.raises(TextError, match=rf"^{flag} must hold .*{split}\.{ending}', which is empty.*--{flag} or --dat"):
        load_corpus(str(tmp_path))


def test_text_of_another_encoding(tmp_path):
    for name in ("train", "validation", "test"):
        (tmp_path / f"{name}.en").write_bytes("größer\n".encode("latin-1"))
        (tmp_path / f"{name}.de").write_text("größer\n")
    with pytest.raises(TextError, match=r"train\.en and .*train\.de must be UTF-8"):
        load_corpus(str(tmp_path))


# ---- a study's progress ----


def test_progress_by_hand():
    """Five runs, two at a time. Two of 60 and 120 seconds: 90 in the mean, and two rounds are left of three runs."""
    progress = Progress(5, jobs=2)
    waiting = ["a", "b", "c", "d", "e"]
    assert progress.line(waiting) == "0 of 5 runs done, time left: known after the first, now a, b"
    progress.count(60.0)
    progress.count(120.0)
    assert progress.seconds_left() == 180.0
    assert progress.line(waiting[2:]) == "2 of 5 runs done, about 3 min left, now c, d"
    for _ in range(3):
        progress.count(90.0)
    assert progress.line([]) == "5 of 5 runs done, none left"


@pytest.mark.parametrize(
    ("seconds", "words"), [(20, "20 s"), (60, "1 min"), (3700, "1 h 02 min"), (3599, "1 h 00 min")]
)
def test_time_left_in_words(seconds, words):
    progress = Progress(2)
    progress.count(seconds)
    assert f"about {words} left" in progress.line(["b"])
