"""The translation recipe's data: every kind of folder, the Hub, and what is wrong with them."""

from pathlib import Path

import datasets
import pytest

from corpora import write_text
from records import DataError
from translation import train as recipe
from translation.data import NEWSTESTS, PROTOCOL_ROWS, load_corpus

HAND = [{"source": f"line {number}", "target": f"Zeile {number}"} for number in range(4)]


def parquet(
    folder: Path, splits: dict[str, list[dict[str, str]]], column: str | None = "translation", end: str = "parquet"
) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        pairs = [{"en": row["source"], "de": row["target"]} for row in rows]
        made = datasets.Dataset.from_list([{column: pair} if column else pair for pair in pairs])
        if end == "parquet":
            made.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
        else:
            made.to_json(str(folder / f"{split}.jsonl"))
    return str(folder)


def test_every_kind_of_folder(tmp_path):
    """Parquet and JSON lines with one column or two, text files, a saved DatasetDict: the same pairs."""
    splits = {"train": HAND, "validation": HAND[:2], "test": HAND[2:]}
    saved = datasets.DatasetDict(
        {
            name: datasets.Dataset.from_list([{"translation": {"en": r["source"], "de": r["target"]}} for r in rows])
            for name, rows in splits.items()
        }
    )
    saved.save_to_disk(tmp_path / "saved")
    folders = [
        parquet(tmp_path / "one", splits),
        parquet(tmp_path / "two", splits, column=None),
        parquet(tmp_path / "json", splits, end="jsonl"),
        write_text(tmp_path / "text", splits),
        str(tmp_path / "saved"),
    ]
    for folder in folders:
        corpus = load_corpus(folder)
        assert corpus.train.to_list() == HAND, folder
        assert (corpus.validation.to_list(), corpus.test.to_list()) == (HAND[:2], HAND[2:])
        assert (corpus.name, corpus.shipped, corpus.test_set) == (folder, False, "test")
        turned = load_corpus(folder, source_lang="de", target_lang="en")
        assert turned.train[0] == {"source": "Zeile 0", "target": "line 0"}


@pytest.mark.parametrize(
    ("names", "are_one"),
    [
        (["train-00000-of-00002", "train-00001-of-00002"], True),
        (["train-00000-of-00002-0123abcd", "train-00001-of-00002-4567cdef"], True),
        (["train-0", "train-1"], True),
        (["train.1", "train.2"], True),
        (["train-small"], True),
        (["train", "train-small"], False),
        (["train", "train-00000-of-00001"], False),
        (["train-00000-of-00002", "train-00000-of-00003"], False),
        (["train-00000-of-00002", "train-0"], False),
        (["train-2016", "train-2017"], False),
        (["train", "train.2017"], False),
    ],
)
def test_files_of_two_sets_are_not_joined(tmp_path, names, are_one):
    """Training rows of both, and nobody told, where a smaller set or last year's lies beside the one that is meant."""
    rows = {"test": HAND, "validation": HAND, **{name: [HAND[place]] for place, name in enumerate(names)}}
    folder = parquet(tmp_path, rows, end="jsonl")
    if are_one:
        assert load_corpus(folder).train.to_list() == HAND[: len(names)]
        return
    with pytest.raises(
        DataError, match=r"train_split must be one file, or shards such as .*, got train.* or set --tr"
    ):
        load_corpus(folder)
    assert len(load_corpus(folder, train_split="test").train) == 4, "of the split that is asked for"


def test_only_line_feeds_end_a_line(tmp_path):
    """A line separator or a carriage return inside a sentence would shift all pairs that follow."""
    rows = [{"source": "a\u2028b\x0cc", "target": "x\ry"}, {"source": "d", "target": "z"}]
    folder = Path(write_text(tmp_path, {"train": rows, "validation": rows, "test": rows}))
    assert load_corpus(str(folder)).train.to_list() == rows
    (folder / "train.en").write_bytes(b"one\r\ntwo\r\n")
    assert load_corpus(str(folder)).train["source"][:] == ["one", "two"], "a file that changed is read again"


def test_other_splits_by_name(tmp_path):
    own = [{"source": f"line {number}", "target": f"Zeile {number}"} for number in range(3003)]
    folder = parquet(tmp_path, {"train": HAND, "dev": HAND[:1], "newstest2014": own})
    corpus = load_corpus(folder, validation_set="dev", test_set="newstest2014")
    assert (corpus.validation.to_list(), corpus.test.to_list()) == (HAND[:1], own), (
        "a split of one's own comes before the Hub's"
    )
    with pytest.raises(
        DataError,
        match=r"validation_set must be one of the splits \['dev', 'newstest2014', 'train'\], or of \['newstest",
    ):
        load_corpus(folder)
    with pytest.raises(DataError, match=r"train_split must be one of the splits .*, got 'big'. Set --train_split."):
        load_corpus(folder, train_split="big", validation_set="dev", test_set="dev")


def test_empty_lines(tmp_path):
    """Left out of training and counted; a test set with one would be another test set."""
    holes = [*HAND, {"source": " ", "target": "x"}, {"source": "x", "target": ""}]
    folder = write_text(
        tmp_path,
        {"train": holes, "validation": HAND, "test": HAND, "hole": holes, "void": [HAND[0] | {"target": " "}]},
    )
    corpus = load_corpus(folder)
    assert (corpus.train.to_list(), corpus.empty_train_rows) == (HAND, 2)
    with pytest.raises(
        DataError,
        match=r"test_set must hold sentence pairs, got 'hole' with 2 empty lines, the first in row 4. Mend it, or",
    ):
        load_corpus(folder, test_set="hole")
    with pytest.raises(
        DataError, match="train_split must hold sentence pairs, got 'void', whose 1 rows are all empty"
    ):
        load_corpus(folder, train_split="void")


def test_missing_sides_count_as_empty(tmp_path):
    parquet(tmp_path, {"train": [*HAND, {"source": "x", "target": None}], "validation": HAND, "test": HAND})
    assert load_corpus(str(tmp_path)).empty_train_rows == 1


def test_columns_and_languages(tmp_path):
    splits = {"train": HAND, "validation": HAND, "test": HAND}
    folder = parquet(tmp_path / "named", splits, column="pairs")
    assert load_corpus(folder, translation_column="pairs").train.to_list() == HAND
    with pytest.raises(
        DataError,
        match=r"translation_column must be one of the columns \['pairs'\] .*, got 'translation', .*Set --translation",
    ):
        load_corpus(folder)
    with pytest.raises(
        DataError, match=r"target_lang must be one of the languages \['de', 'en'\], got 'cs'. Set --target_lang."
    ):
        load_corpus(folder, translation_column="pairs", target_lang="cs")
    with pytest.raises(DataError, match="source_lang and target_lang must differ, got 'de' for both"):
        load_corpus(folder, source_lang="de")
    flat = parquet(tmp_path / "flat", splits, column=None)
    with pytest.raises(
        DataError, match=r"translation_column must hold \{language: sentence\}, got .*. Set --translation_column."
    ):
        load_corpus(flat, translation_column="en")
    numbers = datasets.Dataset.from_dict({"en": [1, 2], "de": ["a", "b"]})
    numbers.to_parquet(str(tmp_path / "flat" / "train-00000-of-00001.parquet"))
    with pytest.raises(DataError, match="source_lang must name text, got 'en' of type"):
        load_corpus(flat)


def test_an_untranslated_text(tmp_path):
    same = [{"source": "the same", "target": "the same"}] * 3 + HAND[:2]
    folder = write_text(tmp_path, {"train": same, "validation": HAND, "test": HAND})
    with pytest.raises(
        DataError,
        match="en and de must be different languages, got the same sentence on both sides in 3 of 5 training rows",
    ):
        load_corpus(folder)


def test_unequal_text_files(tmp_path):
    folder = write_text(tmp_path, {"train": HAND, "validation": HAND, "test": HAND})
    (tmp_path / "train.de").write_text("eins\n")
    with pytest.raises(
        DataError,
        match=r"^train_split must have as many lines in each language, got 4 in '.*train.en' and 1 in '.*train.de'. "
        r"Mend it, or set --train_split or --dataset_name.",
    ):
        load_corpus(folder)


def test_folders_that_hold_nothing(tmp_path):
    with pytest.raises(
        DataError,
        match=r"dataset_name must be a folder that holds .*, which holds none of these for en and de. Set --dataset",
    ):
        load_corpus(str(tmp_path))
    (tmp_path / "train.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"cannot be read: .* Mend its files, or set --dataset_name."):
        load_corpus(str(tmp_path))
    with pytest.raises(DataError, match="max_eval_samples must be >= 1 row, got 0"):
        load_corpus(max_eval_samples=0)


@pytest.fixture
def hub(monkeypatch):
    """A Hub with WMT's sets, whose rows are as many as on the real one; remembers what was asked for."""
    asked, whole = [], list(NEWSTESTS.values())

    def load(name, config, split=None):
        asked.append((name, config, split))
        rows = {key: count for set_, key, count in whole if set_ == name} | {"train": 5}
        sets = {
            key: datasets.Dataset.from_dict(
                {"translation": [{"de": f"Zeile {i}", "en": f"{name} {key} {i}"} for i in range(count)]}
            )
            for key, count in rows.items()
        }
        return sets[split] if split else datasets.DatasetDict(sets)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_protocol_of_ott_et_al(hub):
    """Trained on WMT'16, validated on newstest2013, tested on newstest2014 with all its 3,003 rows."""
    corpus = load_corpus("wmt/wmt16")
    assert hub == [("wmt/wmt16", "de-en", None), ("wmt/wmt14", "de-en", "validation"), ("wmt/wmt14", "de-en", "test")]
    assert (corpus.validation_set, corpus.test_set) == ("newstest2013", "newstest2014")
    assert (len(corpus.train), len(corpus.validation), len(corpus.test)) == (5, 3000, 3003)
    assert corpus.test[0] == {"source": "wmt/wmt14 test 0", "target": "Zeile 0"}
    assert len(load_corpus("wmt/wmt16", test_set="newstest2016").test) == 2999
    assert load_corpus("wmt/wmt16", test_set="test").test[0]["source"] == "wmt/wmt16 test 0"


@pytest.mark.parametrize(
    ("name", "rows", "told"),
    [
        ("newstest2013", 2999, "3,000 rows, got 2,999: BLEU"),
        ("newstest2014", 2737, r"3,003 rows, got 2,737 \(its filtered version, sacrebleu's wmt14\): BLEU"),
        ("test2016", 999, "1,000 rows, got 999: BLEU"),
        ("test_2016_flickr", 1001, "1,000 rows, got 1,001: BLEU"),
    ],
)
def test_a_test_set_that_is_not_whole(tmp_path, name, rows, told):
    """A split that has a published set's name is that set; under another name anything goes."""
    some = [{"source": f"line {number}", "target": f"Zeile {number}"} for number in range(rows)]
    folder = write_text(tmp_path, {"train": HAND, "validation": HAND, name: some, "own": some})
    with pytest.raises(
        DataError, match=rf"test_set {name} must have {told} would not be comparable. Set --test_set to"
    ):
        load_corpus(folder, test_set=name)
    assert len(load_corpus(folder, test_set="own").test) == rows


def test_the_hub_s_test_set_is_not_whole(hub, monkeypatch):
    monkeypatch.setitem(PROTOCOL_ROWS, "newstest2014", 3004)
    with pytest.raises(DataError, match=r"test_set newstest2014 must have 3,004 rows, got 3,003: BLEU"):
        load_corpus("wmt/wmt16")


def test_newstests_are_english_and_german(hub, tmp_path):
    czech = write_text(tmp_path, {"train": HAND})
    (tmp_path / "train.de").rename(tmp_path / "train.cs")
    with pytest.raises(
        DataError, match=r"validation_set=newstest2013 is English and German, got en and cs. Set --validation_set to a"
    ):
        load_corpus(czech, target_lang="cs", validation_set="newstest2013")
    with pytest.raises(DataError, match=r"target_lang must be one of the languages \['de', 'en'\], got 'cs'"):
        load_corpus("wmt/wmt16", target_lang="cs")
    assert hub[-1] == ("wmt/wmt16", "cs-en", None)


def test_a_copy_of_wmt_on_disk_is_tested_as_the_preset_says(tmp_path, monkeypatch):
    """
    Its own splits validation and test are newstest2015 and 2016: BLEU of other sentences, under the preset's name. The
    copy's rows of a name are taken before the Hub's.
    """
    splits = {"train": HAND, "validation": HAND, "test": HAND}
    folder = parquet(tmp_path, splits)
    for preset in ("wmt16", "ott"):
        script = recipe.parse(["--preset", preset, "--dataset_name", folder])[0]
        sets = {name: getattr(script, name) for name in ("dataset_name", "validation_set", "test_set")}
        with pytest.raises(DataError, match=r"validation_set needs 'wmt/wmt14' .* such as validation"):
            load_corpus(**sets)
        with pytest.raises(DataError, match=r"test_set needs 'wmt/wmt14' .* Set --test_set to a split of your own"):
            load_corpus(**{**sets, "validation_set": "validation"})
    monkeypatch.setitem(PROTOCOL_ROWS, "newstest2013", 2)
    monkeypatch.setitem(PROTOCOL_ROWS, "newstest2014", 3)
    parquet(tmp_path, {"newstest2013": HAND[:2], "newstest2014": HAND[1:]})
    corpus = load_corpus(**sets)
    assert (corpus.validation.to_list(), corpus.test.to_list()) == (HAND[:2], HAND[1:])
    flags = f"--preset wmt16 --dataset_name {folder} --validation_set validation --test_set test"
    own = recipe.parse(flags.split())[0]
    assert (own.validation_set, own.test_set) == ("validation", "test")
    czech = recipe.parse(["--preset", "wmt16", "--target_lang", "cs"])[0]
    assert (czech.validation_set, czech.test_set) == (None, None), "that pair's own splits"


def test_hub_out_of_reach():
    """Tests run with HF_HUB_OFFLINE=1, so this asks nobody."""
    with pytest.raises(
        DataError,
        match=r"dataset_name needs 'wmt/wmt16' \(de-en\), .* the Hub is not reachable .* Leave --dataset_name and "
        r"--preset out",
    ):
        load_corpus("wmt/wmt16")
    with pytest.raises(
        DataError,
        match=r"test_set needs 'wmt/wmt14' \(de-en\), .* not reachable .* Set --test_set to a split of your own data",
    ):
        load_corpus(test_set="newstest2014")


@pytest.mark.parametrize(
    ("said", "way_out"),
    [
        (
            "Dataset 'my/set' is a gated dataset on the Hub. You must be authenticated to access it.",
            "gated. Accept its terms at .* set HF_TOKEN",
        ),
        (
            "Dataset 'my/set' doesn't exist on the Hub or cannot be accessed.",
            "Set --dataset_name, or --dataset_config",
        ),
    ],
)
def test_hub_refuses(monkeypatch, said, way_out):
    def refuse(name, config):
        raise datasets.exceptions.DatasetNotFoundError(said)

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=way_out):
        load_corpus("my/set")
