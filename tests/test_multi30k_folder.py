"""The folder that Multi30k goes through fairseq in is of one run, in both halves; fairseq itself is not needed."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from records import DataError
from small_text import RUN, write_pairs
from studies import multi30k, multi30k_oracle, small_translation
from studies.same_run import OtherRunError, check_same_run, identity

STUDIES = Path(__file__).parents[1] / "recipes/studies"


class Words(list):
    """In the place of fairseq's dictionary."""

    nspecial, pad, eos = 4, lambda self: 1, lambda self: 2

    def __init__(self):
        super().__init__(["<s>", "<pad>", "</s>", "<unk>"])

    def add_symbol(self, word):
        self.append(word)


def model_of(config, words):
    """As `parts`: a task, a model of two numbers, a criterion."""
    model = torch.nn.Linear(1, 1)
    model.encoder = SimpleNamespace(layers=[])
    return None, model, None


def trainer_of(config, task, model, criterion):
    """Trains nothing."""
    optimizer = SimpleNamespace(optimizer=torch.optim.Adam(model.parameters()))
    return SimpleNamespace(optimizer=optimizer, begin_epoch=int, train_step=len, set_num_updates=int)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_translation.load(str(write_pairs(tmp_path_factory.mktemp("pairs"))))


@pytest.fixture
def given(data):
    """By seed, what fairseq is given."""
    return {seed: multi30k_oracle.given(replace(RUN, base="all_reduce", seed=seed), data) for seed in (1, 2)}


@pytest.fixture
def theirs(monkeypatch):
    """fairseq's half, with stand-ins for what it takes from there."""
    monkeypatch.syspath_prepend(str(STUDIES))
    others = dict.fromkeys(("convert_namespace_to_omegaconf", "options", "sample_of"), lambda *args: None)
    stand_in = SimpleNamespace(Dictionary=Words, Trainer=trainer_of, parts=model_of, versions=dict, **others)
    monkeypatch.setitem(sys.modules, "oracle_fairseq", stand_in)
    monkeypatch.delitem(sys.modules, "multi30k_fairseq", raising=False)
    module = importlib.import_module("multi30k_fairseq")
    monkeypatch.setattr(module, "settings", lambda given: None)
    monkeypatch.setattr(module.Run, "nll", lambda self, name: 1.0)
    monkeypatch.setattr(module.Run, "_beams", lambda self, name, search: [])
    return module


def test_identity_is_of_all_that_is_given(given):
    first, second = identity(given[1]), identity(given[2])
    assert first == identity({**given[1]})
    assert first["run"]["seed"] == 1
    assert len({first["sha256"], second["sha256"], identity({**given[1], "warmup_updates": 7})["sha256"]}) == 3
    check_same_run(first, identity(given[1]), Path("OUT/given.pt"))


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"seed": 2}, "of seed=1, where seed=2 is asked for"),
        ({"seed": 2, "inner_lr": 0.1}, "of inner_lr=0.02, seed=1, where inner_lr=0.1, seed=2 is asked for"),
        ({}, "of the same settings with other data or batches, where base='all_reduce', inner_lr=0.02, seed=1 is"),
        (None, "of an unknown run, where base='all_reduce', inner_lr=0.02, seed=1 is asked for"),
    ],
)
def test_what_a_refusal_says(given, wanted, said):
    """The folder, what it holds, what is asked, and the way out."""
    run = identity(given[1])["run"]
    held = None if wanted is None else {"run": run, "sha256": "1"}
    with pytest.raises(OtherRunError, match=said) as error:
        check_same_run(held, {"run": run | (wanted or {}), "sha256": "2"}, Path("OUT/state24.pt"))
    assert str(error.value).startswith("'OUT' must hold one run, got state24.pt of ")
    assert str(error.value).endswith("Take another folder as OUT, or ask for the run that this one holds.")


def test_states_of_another_run_are_not_taken_up(given, theirs, tmp_path):
    """Seed 1 leaves its states and goes on from them; seed 2 would train nothing, and translate seed 1's models."""
    theirs.Run(given[1], tmp_path).train()
    again = theirs.Run(given[1], tmp_path)
    again.train()
    assert len(again.curve) == RUN.epochs
    assert again.translate().keys() == {
        f"{name} {kind}" for name in ("validation", "test") for kind in ("best", "last", "mean_of_5")
    }
    other = theirs.Run(given[2], tmp_path)
    with pytest.raises(theirs.OtherRunError, match=rf"state{RUN.epochs}\.pt of seed=1, where seed=2 is asked"):
        other.train()
    other.curve = again.curve
    with pytest.raises(theirs.OtherRunError, match=r"of seed=1, where seed=2 is asked"):
        other.translate()


def test_states_of_before_are_refused(given, theirs, tmp_path):
    """They have no identity: of which run they are is not known."""
    torch.save({"model": {}, "optimizer": {}, "curve": [], "seconds": 1.0}, tmp_path / "state24.pt")
    with pytest.raises(theirs.OtherRunError, match="of an unknown run"):
        theirs.Run(given[1], tmp_path).train()


def test_the_program_ends_in_one_line_and_names_the_run_of_its_translations(given, theirs, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["multi30k_fairseq.py", str(tmp_path)])
    torch.save(given[1], tmp_path / "given.pt")
    theirs.main()
    assert torch.load(tmp_path / "translations.pt", weights_only=True)["identity"] == identity(given[1])
    torch.save(given[2], tmp_path / "given.pt")
    with pytest.raises(SystemExit, match=r"^multi30k_fairseq\.py: '.*' must hold one run, got state.*\.$") as ended:
        theirs.main()
    assert "\n" not in str(ended.value)


def test_fairseqs_half_wants_what_the_other_half_writes(theirs, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["multi30k_fairseq.py", str(tmp_path)])
    said = rf"multi30k_fairseq.py: folder must hold given.pt, written by multi30k_oracle.py write, got '{tmp_path}'."
    with pytest.raises(SystemExit) as ended:
        theirs.main()
    assert ended.value.code == f"{said} Give another."


def test_score_wants_both_halves(data, given, tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"folder must hold given\.pt, written by the command write, got "):
        multi30k_oracle.score_folder(tmp_path, data)
    torch.save(given[1], tmp_path / "given.pt")
    monkeypatch.setattr(multi30k, "load", lambda name: data)
    monkeypatch.setattr(sys, "argv", ["multi30k_oracle.py", "score", str(tmp_path), "--dataset_name", "x"])
    with pytest.raises(
        SystemExit, match=r"^multi30k_oracle\.py: folder must hold translations\.pt, written by multi30k_f"
    ):
        multi30k_oracle.main()


def test_a_second_seed_is_refused_by_write_and_by_score(data, given, tmp_path, monkeypatch):
    monkeypatch.setattr(multi30k, "load", lambda name: data)
    monkeypatch.setattr(multi30k_oracle, "make_run", lambda *args: replace(RUN, base="all_reduce", seed=args[-1]))

    def call(command, *flags):
        words = ["multi30k_oracle.py", command, str(tmp_path / "out"), "--dataset_name", "x", *flags]
        monkeypatch.setattr(sys, "argv", words)
        multi30k_oracle.main()

    for _ in range(2):  # the same run may be written again
        call("write", "--inner_lr", "0.02", "--seed", "1")
    with pytest.raises(SystemExit, match=r"multi30k_oracle\.py: .* got given\.pt of seed=1, where seed=2 is asked"):
        call("write", "--inner_lr", "0.02", "--seed", "2")
    told = {"translations": {}, "epochs": {}, "curve": [], "seconds": 1.0, "versions": {}}
    for own, said in (({"identity": identity(given[2])}, "of seed=2, where seed=1 is"), ({}, "of an unknown run")):
        torch.save({**told, **own}, tmp_path / "out/translations.pt")
        with pytest.raises(SystemExit, match=rf"got translations\.pt .*{said}"):
            call("score")
    torch.save({**told, "identity": identity(given[1])}, tmp_path / "out/translations.pt")
    call("score", "--records", str(tmp_path))
    record = json.loads((tmp_path / "multi30k/fairseq_lr0.02_seed1.json").read_text())
    search = (record["num_beams"], record["length_penalty"], record["train_rows"])
    assert search == (4, 0.6, len(data.train.rows))
    assert record["tokens_per_update"]["at_most"] == RUN.batch_size * RUN.workers


def test_translations_are_not_scored_against_other_data(data, given, tmp_path, monkeypatch):
    """Another training text has another BPE: the same tokens would be other words, and BLEU near 0."""
    tmp_path.joinpath("out").mkdir()
    told = {"translations": {}, "epochs": {}, "curve": [], "seconds": 1.0, "versions": {}}
    torch.save(given[1], tmp_path / "out/given.pt")
    torch.save({**told, "identity": identity(given[1])}, tmp_path / "out/translations.pt")
    multi30k_oracle.score_folder(tmp_path / "out", data)
    rows = [{**data.train.rows[0], "labels": data.train.rows[0]["labels"][1:]}, *data.train.rows[1:]]
    other = replace(data, train=replace(data.train, rows=rows), sha256="c0ffee")
    with pytest.raises(
        OtherRunError, match=r"got given\.pt of the same settings with other data or batches.*Set --dataset_name"
    ):
        multi30k_oracle.score_folder(tmp_path / "out", other)
    beside = tmp_path / "multi30k/table1/run.json"
    beside.parent.mkdir(parents=True)
    beside.write_text(json.dumps({"dataset": "x", "dataset_sha256": "another"}))
    monkeypatch.setattr(multi30k, "load", lambda name: data)
    words = ["multi30k_oracle.py", "score", str(tmp_path / "out"), "--dataset_name", "x", "--records", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match=r"multi30k_oracle\.py: dataset_name must be what the runs in .* are of"):
        multi30k_oracle.main()
