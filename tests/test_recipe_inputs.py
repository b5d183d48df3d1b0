"""Data that cannot be used: the error names the file and the flag that mends it. And a study's progress."""

from __future__ import annotations

import gc
import hashlib
import warnings
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest
from PIL import Image

from image.data import load_images
from image.pixels import make_dataset
from records import DataError
from studies.progress import Progress
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
    of_images = pyarrow.parquet.read_table(tmp_path / "train.parquet")
    pyarrow.parquet.write_table(of_images.slice(0, 0), tmp_path / "train.parquet")  # `to_parquet` may want a row
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
    with pytest.raises(DataError, match=rf"^{flag} must hold .*{split}\.{ending}', which is empty.*--{flag} or --dat"):
        load_corpus(str(tmp_path))


def test_text_of_another_encoding(tmp_path):
    for name in ("train", "validation", "test"):
        (tmp_path / f"{name}.en").write_bytes("größer\n".encode("latin-1"))
        (tmp_path / f"{name}.de").write_text("größer\n")
    with pytest.raises(
        DataError, match=r"train_split must be text in UTF-8, got '.*train\.en' with line 1 .* --train_"
    ):
        load_corpus(str(tmp_path))


EN = ["the cat is here", "you are with the dog", "that is for you", "of the cat and the dog"] * 5
DE = ["die Katze ist hier", "der Hund ist mit dir", "das ist nicht von mir", "ein Hund und eine Katze"] * 5


def text_folder(folder, **changed):
    """`train`, `validation` and `test` of twenty lines; `changed` by `split_language`: bytes, or None for no file."""
    for split in ("train", "validation", "test"):
        for language, lines in (("en", EN), ("de", DE)):
            content = changed.get(f"{split}_{language}", "".join(f"{line}\n" for line in lines).encode())
            if content is not None:
                (folder / f"{split}.{language}").write_bytes(content)
    return str(folder)


def lines(sentences, end="\n", encoding="utf-8"):
    return "".join(f"{line}{end}" for line in sentences).encode(encoding)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"train_de": None},
            r"train_split must have a file for each language, got '.*train.en' without 'train.de'. Add",
        ),
        (
            {"test_en": None},
            r"test_set must have a file for each language, got '.*test.de' without 'test.en'. .*--test_",
        ),
        (
            {"train_en": None, "validation_en": None, "test_en": None},
            r"train_split must have a file for each language, got '.*train.de' without 'train.en'. .* --source_lang",
        ),
        (
            {"test_en": None, "test_de": None},
            r"test_set must be one of the splits \['train', 'validation'\].*--test_set",
        ),
        (
            {"validation_de": lines(DE[:17])},
            r"validation_set must have as many lines in each language, got 20 in '.*n\.en' and 17 in '.*n\.de'. Mend",
        ),
        (
            {"test_en": lines(EN, encoding="utf-16")},
            r"test_set must be text in UTF-8, got '.*test.en' with line 1 that",
        ),
        (
            {"train_de": lines(EN)},
            r"en and de must be different languages, .* 20 of 20 training rows. Set --source_lang",
        ),
        (
            {"test_de": lines(EN)},
            r"en and de must be different .* 20 of 20 rows of test_set test. Set --source_lang and",
        ),
        (
            {"train_en": lines(DE), "train_de": lines(EN)},
            r"source_lang=en and target_lang=de must name the languages of the training rows, got the other way round",
        ),
        (
            {"test_en": lines(DE), "test_de": lines(EN)},
            r"source_lang=en .* of the rows of test_set test, got the other way .* Exchange the names .* --test_set",
        ),
        (
            {"test_de": lines(["", *DE[1:]])},
            r"test_set must hold sentence pairs, got 'test' with 1 empty lines, .* row 0",
        ),
        (
            {"test_de": lines(DE, end="\r"), "test_en": lines(EN, end="\r")},
            r"test_set must end lines with line feeds, got one line with carriage returns in '.*test.en' or",
        ),
    ],
)
def test_wrong_text_files_are_named(tmp_path, changed, said):
    with pytest.raises(DataError, match=f"^{said}"):
        load_corpus(text_folder(tmp_path, **changed))


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte-order mark"])
def test_marks_of_other_systems_are_no_text(tmp_path, end, mark):
    folder = text_folder(tmp_path, train_en=mark + lines(EN, end), test_de=mark + lines(DE, end))
    corpus = load_corpus(folder)
    assert (corpus.train["source"][:], corpus.test["target"][:]) == (EN, DE)
    text = "\n".join([*EN, *DE]).encode()
    assert corpus.sha256() == dict.fromkeys(("train", "validation", "test"), hashlib.sha256(text).hexdigest())


def test_swapped_languages_are_seen_in_english_and_german_alone(tmp_path):
    """Under other names nobody can tell; and a few words are no evidence."""
    folder = Path(text_folder(tmp_path, train_en=lines(DE[:4]), train_de=lines(EN[:4])))
    assert load_corpus(str(folder)).train["source"][:] == DE[:4]
    for path in folder.glob("*.en"):
        path.rename(path.with_suffix(".xx"))
    (folder / "train.xx").write_bytes(lines(DE))
    (folder / "train.de").write_bytes(lines(EN))
    assert load_corpus(str(folder), source_lang="xx").train["source"][:] == DE


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
