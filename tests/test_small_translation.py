"""
Translation in small: the schedule, figures against torch and sacrebleu, all-reduce against one Adam, a run and its
record.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import datasets
import pytest
import sacrebleu
import torch

from devices import on_each_device
from records import DataError
from small_text import RUN, TINY, write_pairs
from studies import graphed, multi30k, reproduce, showing, small_runs, small_translation
from studies.kept import Clock, Keeper, Progress
from studies.kept_models import KeptModels
from studies.plan import TASKS, make_run, published
from translation.bleu import tokenised_bleu
from translation.model import MODEL_SIZES, PUBLISHED_SIZES, make_transformer, translate
from translation.tokens import TokenBatches, collate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def data(folder):
    return small_translation.load(str(folder))


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(MODEL_SIZES, "mini", TINY)


def test_the_schedule_in_numbers():
    """Warm-up over 20 steps, then 1/sqrt: half of the peak at the 80th step."""
    factor = [small_translation.learning_rate_factor(step, 20) for step in range(200)]
    assert [factor[step] for step in (0, 9, 19, 44, 79)] == pytest.approx([0.05, 0.5, 1.0, 2 / 3, 0.5])
    assert factor[199] == pytest.approx(math.sqrt(0.1))


@pytest.mark.parametrize(
    ("study", "task", "epochs", "expected"),
    [
        ("tuning", "multi30k", 12, 24),
        ("table1", "multi30k", 24, 24),
        ("table1", "multi30k", 1, 1),
        ("tuning", "translation", 22, 22),
    ],
)
def test_runs_that_tune_have_the_schedule_of_those_they_tune_for(study, task, epochs, expected):
    assert make_run(study, task, "sgp", 0.0, 0.005, 0, epochs=epochs).warmup_epochs == 0.1 * expected


def test_the_published_size():
    """4 workers of 2,048 tokens, 62 updates a pass: 7,998 of 8,000, and 2,000 of warm-up."""
    runs = published("multi30k")
    assert [(run.base, run.seed, run.workers, run.batch_size, run.inner_lr) for run in runs] == [
        ("all_reduce", seed, 4, 2048, 0.005) for seed in (1, 2, 3)
    ]
    assert runs[0].warmup_epochs * 62 == pytest.approx(2000, abs=1)
    assert runs[0].name == "multi30k/published/all_reduce_beta0.0_lr0.005_epochs129_batch2048_seed1"
    assert published("translation") == []
    judging = small_translation.judging_of(runs[0])
    assert (judging.num_beams, judging.length_penalty, judging.means) == (5, 1.0, (5, 10))
    ours = small_translation.judging_of(make_run("table1", "multi30k", "sgp", 0.0, 0.005, 1))
    assert (ours.num_beams, ours.length_penalty, ours.means) == (4, 0.6, (5,))


@pytest.mark.parametrize(("study", "by_torch"), [("published", False), ("table1", True)])
def test_a_published_run_starts_as_it_was_published(data, monkeypatch, study, by_torch):
    """By fairseq 0.9.0, whose feed-forward layers are Glorot's: their biases are 0."""
    monkeypatch.setitem(PUBLISHED_SIZES, "mini", 2021)
    model = small_translation._make_job(replace(RUN, study=study), data, 0, None, "cpu").model
    layer = model.model.encoder.layers[0]
    assert bool(layer.fc1.bias.any()) is bool(layer.fc2.bias.any()) is by_torch
    assert layer.self_attn.q_proj.bias.any()


def test_a_published_run_is_judged_as_it_was_published(data, tmp_path, monkeypatch):
    """Its mean is of ten last averages, by its own beam; ours of five is beside it."""
    searches = []
    monkeypatch.setattr(small_translation, "translate", lambda *_, **search: searches.append(search) or ["x"] * 99)
    monkeypatch.setattr(small_translation, "all_scores", lambda *_: {"bleu": float(len(searches))})
    models = KeptModels(tmp_path, small_translation.PUBLISHED.means)
    model = make_transformer("mini", len(data.tokenizer))
    for epoch in range(1, 13):
        models.keep(epoch, 1 / epoch, model)
    looks = [{"validation_nll": 1.0}]
    told = small_translation._judge(looks, models, data, small_translation.PUBLISHED, "cpu")
    assert told["epochs_of_models"]["mean_of_10"] == list(range(3, 13))
    assert told["epochs_of_models"]["mean_of_5"] == list(range(8, 13))
    assert {(search["num_beams"], search["length_penalty"]) for search in searches} == {(5, 1.0)}
    assert told["metrics"]["test_bleu_mean_of_10"] != told["metrics"]["test_bleu_mean_of_5"]


def test_the_warm_up_of_a_short_tuning_run(data, monkeypatch, tmp_path):
    """Of 10 passes, though it ends after 3: its rate is still rising at the end of the first."""
    monkeypatch.setitem(TASKS["translation"].sizes, "epochs", 10)
    for study, peak in (("tuning", 10), ("table1", 3)):
        job = small_translation._make_job(replace(RUN, study=study), data, 0, KeptModels(tmp_path), "cpu")
        warm_up = round(0.1 * peak * len(job.batches(0)))
        assert job.learning_rate_factor(0) == pytest.approx(1 / warm_up)
        assert job.learning_rate_factor(warm_up - 1) == 1.0


def test_long_pairs_are_left_out(folder, data):
    assert data.name == folder.name
    assert [len(part.rows) for part in (data.train, data.validation, data.test)] == [60, 7, 5]
    assert len(data.lengths) == 60
    assert data.lengths[:, 1].tolist() == [len(row["labels"]) for row in data.train.rows]
    for part in (data.train, data.validation, data.test):
        assert max(len(ids) for row in part.rows for ids in row.values()) <= small_translation.HELP_TEXT.max_length
        texts = data.tokenizer.batch_decode([row["labels"] for row in part.rows], skip_special_tokens=True)
        assert texts == part.targets


def test_the_digest_knows_every_sentence(folder, data, tmp_path):
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.parquet").write_bytes((folder / f"{split}.parquet").read_bytes())
    assert small_translation.load(str(tmp_path)).sha256 == data.sha256
    rows = datasets.Dataset.from_parquet(str(folder / "test.parquet"), keep_in_memory=True)
    rows.map(lambda row: {"translation": {**row["translation"], "de": "Hilfe"}}, keep_in_memory=True).to_parquet(
        str(tmp_path / "test.parquet")
    )
    assert small_translation.load(str(tmp_path)).sha256 != data.sha256


@torch.no_grad()
def test_losses_are_torchs_sentence_by_sentence(data):
    """
    NLL: -log p of every label; smoothed by 0.1: nine tenths of it and a tenth of the mean of -log p over the
    vocabulary.
    """
    torch.manual_seed(0)
    model = make_transformer("mini", len(data.tokenizer))
    nll, smoothed, tokens = 0.0, 0.0, 0
    for row in data.validation.rows:
        labels = torch.tensor(row["labels"])
        before = torch.cat([torch.zeros(1, dtype=torch.long), labels[:-1]])
        logits = model.eval()(input_ids=torch.tensor([row["input_ids"]]), decoder_input_ids=before[None]).logits[0]
        log_p = torch.log_softmax(logits.double(), dim=-1)
        nll -= float(log_p[range(len(labels)), labels].sum())
        smoothed -= float(0.9 * log_p[range(len(labels)), labels].sum() + 0.1 * log_p.mean(dim=-1).sum())
        tokens += len(labels)
    model.train()
    assert small_translation._evaluate(model, data.validation) == pytest.approx(
        (smoothed / tokens, nll / tokens), rel=1e-5
    )
    assert model.training


class NotCaptured:
    """In place of a CUDA graph: the function itself."""

    def __init__(self, function, changes, memory):
        self.function = function

    def __call__(self, value):
        return self.function(value)


@on_each_device
def test_graphed_passes_train_as_plain_ones(monkeypatch, data, device):
    """Batches filled up to a few shapes: the same run up to rounding; gossip and slow momentum."""
    run = replace(RUN, base="sgp")
    plain = small_translation.train(run, data)
    if device == "cpu":
        monkeypatch.setattr(small_translation, "GRAPHED", ("cpu",))
        monkeypatch.setattr(graphed, "Captured", NotCaptured)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    filled = small_translation.train(run, data, device=device)
    assert len(filled["curve"]) == RUN.epochs
    for mine, its in zip(filled["curve"], plain["curve"], strict=True):
        assert mine == pytest.approx(its, rel=1e-4)


def test_all_reduce_is_one_adam_on_the_mean_gradient(data, tmp_path):
    """Two workers of 80 tokens against torch's Adam on the mean of both losses."""
    run = replace(RUN, base="all_reduce", outer_momentum=0.0, epochs=1)
    jobs, models = {}, KeptModels(tmp_path)

    def make_job(rank):
        jobs[rank] = small_translation._make_job(run, data, rank, models, "cpu")
        jobs[rank].look = lambda epoch, is_last: {}
        return jobs[rank]

    steps = small_runs.train_workers(run, make_job)["steps"]
    torch.manual_seed(run.seed)
    model = make_transformer("mini", len(data.tokenizer))
    adam = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98))
    samplers = [TokenBatches(data.lengths, 80, seed=3, rank=rank, world_size=2) for rank in range(2)]
    assert steps == len(samplers[0]) >= 3
    for step, batches in enumerate(zip(*samplers, strict=True)):
        adam.param_groups[0]["lr"] = run.inner_lr * small_translation.learning_rate_factor(step, 0.1 * steps)
        losses = [
            small_translation._losses(model, collate([data.train.rows[row] for row in batch]), 0.1)[0]
            for batch in batches
        ]
        (sum(losses) / 2).backward()
        adam.step()
        adam.zero_grad()
    for rank in range(2):
        ours = dict(jobs[rank].model.named_parameters())
        for name, expected in model.named_parameters():
            # Attention does not depend on it: its gradient is rounding, which Adam makes large.
            if not name.endswith("k_proj.bias"):
                torch.testing.assert_close(ours[name], expected, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["local_sgd", "sgp", "all_reduce"])
def test_a_run_writes_a_record_and_is_not_run_again(tmp_path, monkeypatch, data, base):
    monkeypatch.setattr(reproduce, "_load", lambda task, dataset_name: data)
    run = replace(RUN, base=base, outer_momentum=0.0 if base == "all_reduce" else 0.5)
    written = reproduce.run_one(run, None, str(tmp_path))
    found = reproduce.find_record(run, tmp_path)
    assert found == json.loads(json.dumps(written))
    steps = 3 * len(TokenBatches(data.lengths, 80, world_size=2))
    assert (found["steps"], found["rounds"]) == (steps, 0 if base == "all_reduce" else steps // 3)
    assert (found["bytes_sent_per_worker"] or 0) > 0 or base == "all_reduce"
    metrics, curve = found["metrics"], found["curve"]
    assert [look["epoch"] for look in curve] == [1, 2, 3]
    assert metrics["validation_nll"] == curve[2]["validation_nll"]
    for nats in ("training_loss", "training_nll", "validation_nll"):
        assert [look[f"{nats}_bits"] for look in curve] == [look[nats] / math.log(2) for look in curve]
    assert metrics["best_validation_nll"] == min(look["validation_nll"] for look in curve)
    assert curve[2]["training_loss"] < curve[0]["training_loss"] - 0.5, "it learns"
    assert {column.removesuffix("_bits") for column in showing.SHOWN["translation"].columns} <= set(metrics)
    assert found["bleu_signature"] == str(_sacrebleu(data.test.targets, data.test.targets)[1])
    assert found["model"] == f"MarianMTModel, {16 * len(data.tokenizer) + 2224 + 3344:,} parameters", (
        "embedding, encoder, decoder"
    )
    assert {"dataset", "dataset_sha256", "versions", "commit", "hardware", "test_rows"} <= set(found)
    assert {"sacrebleu", "tokenizers"} <= set(found["versions"])
    header, _, row = (line.split(" | ") for line in reproduce.table([found], "translation").splitlines())
    assert row[0].startswith(f"| {base}, γ 0.02, τ 3")
    for nats in ("validation_nll", "training_loss"):
        assert row[header.index(showing.in_words(nats))] == f"{metrics[nats]:.4f} (1)"
        assert row[header.index(showing.in_words(f"{nats}_bits"))] == f"{metrics[nats] / math.log(2):.4f} (1)"
    reproduce.plot([found], "translation", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 0


def _sacrebleu(hypotheses, references):
    metric = sacrebleu.BLEU()
    return metric.corpus_score(hypotheses, [references]).score, metric.get_signature()


def test_bleu_is_sacrebleus_on_the_beams_translations(data):
    """A model that has learned its few test sentences by heart, and none of validation's."""
    torch.manual_seed(0)
    model = make_transformer("mini", len(data.tokenizer))
    adam = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        small_translation._losses(model, collate(data.test.rows), 0.0)[0].backward()
        adam.step()
        adam.zero_grad()
    scores = small_translation._scores(model, data, small_translation.Judging())
    for name, part in (("test", data.test), ("validation", data.validation)):
        hypotheses = translate(model, data.tokenizer, part.sources, num_beams=4, length_penalty=0.6)
        assert scores[f"{name}_bleu"] == _sacrebleu(hypotheses, part.targets)[0]
    assert scores["test_bleu"] > 50 > scores["validation_bleu"]
    greedy = translate(model, data.tokenizer, data.validation.sources, num_beams=1)
    assert _sacrebleu(greedy, data.validation.targets)[0] != scores["validation_bleu"]


def test_data_without_a_short_test_pair_is_refused(folder, tmp_path):
    """What translation.py would say names flags that reproduce.py lacks; here all is mended by --dataset_name."""
    (no_test := tmp_path / "no_test").mkdir()
    for place in (tmp_path, no_test):
        for split in ("train", "validation"):
            (place / f"{split}.parquet").write_bytes((folder / f"{split}.parquet").read_bytes())
    rows = datasets.Dataset.from_parquet(str(folder / "test.parquet"), keep_in_memory=True)
    rows.select([len(rows) - 1]).to_parquet(str(tmp_path / "test.parquet"))
    with pytest.raises(
        DataError,
        match=r"validation and test must hold pairs of at most 32 tokens a side, got none. Set --dataset_name",
    ):
        small_translation.load(str(tmp_path))
    with pytest.raises(DataError, match=r"test_set must be one of the splits .* Set --dataset_name") as error:
        small_translation.load(str(no_test))
    assert "--test_set" not in str(error.value)
    rows.select([0]).map(lambda row: {"translation": {"en": "", "de": ""}}, keep_in_memory=True).to_parquet(
        str(tmp_path / "test.parquet")
    )
    with pytest.raises(DataError, match=r"1 empty lines, the first in row 0. Mend it, or set --dataset_name") as error:
        small_translation.load(str(tmp_path))
    assert "--test_set" not in str(error.value)


ADVICE = {
    small_translation: "--dataset_name to other English-German pairs, or leave it out for the shipped help text.",
    multi30k: "--dataset_name to another folder with all of Multi30k, its splits named train, validation and test.",
}


@pytest.mark.parametrize("task", ADVICE, ids=["translation", "multi30k"])
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"test.de": None}, r"a file for each language, got '.*test\.en' without 'test\.de'\. Add it, or set"),
        ({"test.de": ""}, r"must hold sentence pairs, got '.*test\.de', which is empty\. Fill it, or set"),
        (
            {"test.de": "eins\n"},
            r"as many lines in each language, got 60 in '.*test\.en' and 1 in '.*test\.de'\. Mend it, or set",
        ),
        (
            {"test.de": "the cat is here\n" * 60, "test.en": "die Katze ist nicht hier\n" * 60},
            r"got the other way round: .* 240 are in the other's sentences, 0 in their own, in the first 60 rows\. "
            "Exchange the names of its files or columns, or set",
        ),
        ({"test.de": None, "test.en": None}, r"must be one of the splits .*, got 'test'\. Set"),
        ({"train.de": "\n" * 60}, r"got 'train', whose 60 rows are all empty\. Set"),
    ],
)
def test_wrong_text_ends_in_the_advice_of_the_task(tmp_path, changed, said, task):
    """What mends the data stays; of the recipe's flags --dataset_name alone, for help text or Multi30k."""
    for split in ("train", "validation", "test"):
        for name, line in ((f"{split}.en", "the cat is here\n"), (f"{split}.de", "die Katze ist nicht hier\n")):
            content = changed.get(name, line * 60)
            if content is not None:
                (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=rf"{said} {re.escape(ADVICE[task])}$") as error:
        task.load(str(tmp_path))
    assert set(re.findall(r"--\w+", str(error.value))) == {"--dataset_name"}


def test_shards_of_two_sets_end_in_the_advice_of_the_task(folder, tmp_path):
    for name in ("train", "train-small", "validation", "test"):
        source = folder / f"{name.partition('-')[0]}.parquet"
        (tmp_path / f"{name}.parquet").write_bytes(source.read_bytes())
    with pytest.raises(DataError, match=r"Move the others away or rename them, or set --dataset_name to another"):
        multi30k.load(str(tmp_path))


def test_kept_models_are_the_best_the_last_and_the_mean_of_five(tmp_path):
    """Weights 1 to 7, the best at epoch 2; then the run goes on from epoch 6 once more, and its end is another."""
    model = torch.nn.Linear(1, 1, bias=False)

    def keep(epoch, nll, weight):
        torch.nn.init.constant_(model.weight, weight)
        KeptModels(tmp_path).keep(epoch, nll, model)

    for epoch in range(1, 8):
        keep(epoch, 1.0 if epoch == 2 else 2.0, float(epoch))
    kept = KeptModels(tmp_path)
    assert kept.epochs() == {"best": [2], "last": [7], "mean_of_5": [3, 4, 5, 6, 7]}
    assert {kind: kept.mean(epochs)["weight"].item() for kind, epochs in kept.epochs().items()} == {
        "best": 2.0,
        "last": 7.0,
        "mean_of_5": 5.0,
    }
    keep(6, 2.0, 16.0)  # 7 goes: it was of what is run again
    keep(7, 0.5, 27.0)
    assert kept.epochs() == {"best": [7], "last": [7], "mean_of_5": [3, 4, 5, 6, 7]}
    assert kept.mean(kept.epochs()["mean_of_5"])["weight"].item() == (3 + 4 + 5 + 16 + 27) / 5
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    "run",
    [RUN, replace(RUN, base="all_reduce", outer_momentum=0.0), replace(RUN, base="sgp")],
    ids=["Local Adam", "AR-Adam", "SGP"],
)
def test_a_run_that_is_cut_off_goes_on_and_ends_alike(tmp_path, monkeypatch, data, run, caplog):
    """
    Its curve, all scores and the mean of its models are those of a run that was never cut off, with each worker's own
    dropout.
    """
    monkeypatch.setitem(MODEL_SIZES, "mini", {**TINY, "dropout": 0.3})
    monkeypatch.setattr(reproduce, "_load", lambda task, dataset_name: data)
    monkeypatch.setattr(reproduce, "KEPT", ("translation",))
    whole = reproduce.run_one(run, None, str(tmp_path / "whole"))
    evaluate, looks = small_translation._evaluate, []

    def cut_off(*given):
        looks.append(1)
        if len(looks) == 5:  # two looks of an epoch: told rows and validation; the third epoch's
            raise KeyboardInterrupt
        return evaluate(*given)

    monkeypatch.setattr(small_translation, "_evaluate", cut_off)
    with pytest.raises(BaseException):  # noqa: B017
        reproduce.run_one(run, None, str(tmp_path / "cut"))
    monkeypatch.setattr(small_translation, "_evaluate", evaluate)
    assert (tmp_path / "cut" / f"{run.name}.state" / "epoch2").is_dir()
    gone_on = reproduce.run_one(run, None, str(tmp_path / "cut"))
    assert gone_on["metrics"] == whole["metrics"]
    assert gone_on["curve"] == whole["curve"]
    assert (
        gone_on["epochs_of_models"]
        == whole["epochs_of_models"]
        == {
            "best": whole["epochs_of_models"]["best"],
            "last": [3],
            "mean_of_5": [1, 2, 3],
        }
    )
    assert not (tmp_path / "cut" / f"{run.name}.state").exists()
    assert "not the average" not in caplog.text, "what is saved is what the others start from"


def test_what_is_not_all_of_multi30k_is_refused(folder, tmp_path):
    with pytest.raises(DataError, match=r"must be a folder with Multi30k's .* got None.* Set --dataset_name"):
        multi30k.load(None)
    said = r"^dataset_name must be .* 29,000 pairs in train .*got 60 in '.*Set --dataset_name"
    with pytest.raises(DataError, match=said):
        multi30k.load(str(folder))
    folder = tmp_path / "as it is handed out"
    folder.mkdir()
    for split in ("train", "val", "test_2016_flickr"):
        for language, words in (("en", "A dog runs.\n"), ("de", "Ein Hund läuft.\n")):
            (folder / f"{split}.{language}").write_text(words)
    with pytest.raises(DataError, match=r"'val'.* Set --dataset_name .* its splits named train, validation and test"):
        multi30k.load(str(folder))


def test_every_set_of_multi30k_has_its_length(folder, monkeypatch, capsys):
    """That of each is checked, and text that is not the records' is told, whatever its length."""
    rows = {"train": 60, "validation": 7, "test": 5}
    for name in rows:
        monkeypatch.setattr(multi30k, "ROWS", {**rows, name: 1_014})
        said = rf"test2016\), 1,014 pairs in {name} of at most 128 .*got {rows[name]} in '.*'.* Set --dataset_name"
        with pytest.raises(DataError, match=said):
            multi30k.load(str(folder))
    monkeypatch.setattr(multi30k, "ROWS", rows)
    data = multi30k.load(str(folder))
    told = f"{folder}: its text has SHA-256 {data.sha256[:12]}, that of the records here fb4d09956996. "
    assert capsys.readouterr().out.startswith(told)
    monkeypatch.setattr(multi30k, "SHA256", data.sha256)
    multi30k.load(str(folder))
    assert not capsys.readouterr().out


def test_tokenised_bleu_by_hand():
    """
    One sentence of 6 tokens, the comma split off; one wrong token at its end: 5/6, 4/5, 3/4, 2/3 of n-grams match, so
    BLEU is (5/6 4/5 3/4 2/3)^(1/4) = (1/3)^(1/4).
    """
    found = tokenised_bleu(["Hunde, die bellen, Sie"], ["Hunde, die bellen, sie"])
    assert found == pytest.approx(100 * (1 / 3) ** 0.25)
    assert tokenised_bleu(["Hunde, die bellen, Sie"], ["Hunde, die bellen, sie"], lowercase=True) == pytest.approx(100)


def test_a_published_run_ends_after_ten_passes_without_gain(data, tmp_path):
    """At a rate of 0 no pass is better than the first: 11 of 12. Left and taken up there, it trains no further."""
    run = replace(RUN, study="published", base="all_reduce", outer_momentum=0.0, inner_lr=0.0, epochs=12)
    told = small_translation.train(run, data)
    assert [look["epoch"] for look in told["curve"]] == list(range(1, 12))
    assert len({look["validation_nll"] for look in told["curve"]}) == 1
    assert told["epochs_of_models"]["mean_of_10"] == list(range(2, 12))
    assert small_translation.train(replace(run, study="table1"), data)["curve"][-1]["epoch"] == 12
    state = tmp_path / "state"
    left = small_translation.train(run, data, Keeper(state, {}, 4, Clock(0), cpu=True))
    assert left is None
    while left is None:
        assert len(list(state.glob("epoch*"))) == 1
        left = small_translation.train(run, data, Keeper(state, {}, 4, Clock(0), cpu=True))
    for name in ("curve", "steps", "metrics"):
        assert left[name] == told[name], name


@pytest.mark.parametrize(
    ("nlls", "patience", "over"),
    [
        ([3.0, 2.0, 2.5, 2.4], 2, True),
        ([3.0, 2.0, 2.5], 2, False),
        ([3.0, 2.0, 2.0, 2.0], 2, True),  # as low is no gain
        ([3.0, 2.0, 2.5, 1.9], 2, False),
        ([3.0, 4.0, 5.0, 6.0, 7.0], 0, True),  # its five epochs are done
        ([3.0, 4.0, 5.0, 6.0], 0, False),
        ([], 2, False),
    ],
)
def test_when_a_run_is_over(nlls, patience, over):
    progress = Progress(len(nlls), curve=[{"validation_nll": nll} for nll in nlls])
    assert small_runs.is_over(SimpleNamespace(patience=patience, epochs=5), progress) == over
