"""The same run of Multi30k by fairseq, and what docs/results.md says of both."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import sacrebleu
import torch

from records import half_interval, mean_and_interval
from small_text import RUN, TINY, write_pairs
from studies import multi30k_oracle, multi30k_tables, reproduce, showing, small_runs, small_translation
from studies.plan import choose, make_run, published, run_of
from translation.model import MODEL_SIZES

RECIPES = Path(__file__).parents[1] / "recipes"
DOCS, RECORDS = RECIPES.parent / "docs", RECIPES / "records"
TABLE1, SWEEP = RECORDS / "multi30k/table1", RECORDS / "multi30k/sweep"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_translation.load(str(write_pairs(tmp_path_factory.mktemp("pairs"))))


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(MODEL_SIZES, "mini", TINY)


def test_fairseq_is_given_the_batches_and_the_rate_of_the_run(data):
    run = replace(RUN, base="all_reduce", outer_momentum=0.0)
    given = multi30k_oracle.given(run, data)
    used = {}

    def make_job(rank):
        job = small_translation._make_job(run, data, rank, None, "cpu")
        job.look = lambda epoch, is_last: {}

        def learn(rows):
            used.setdefault(rank, []).append(rows)
            for parameter in job.model.parameters():
                parameter.grad = torch.zeros_like(parameter)

        job.learn = learn
        return job

    steps = small_runs.train_workers(run, make_job)["steps"]
    updates = [update for epoch in given["epochs"] for update in epoch]
    assert [list(update) for update in zip(used[0], used[1], strict=True)] == updates
    assert len(updates) == steps
    peak = max(range(steps), key=lambda step: small_translation.learning_rate_factor(step, 0.1 * steps))
    assert given["warmup_updates"] == peak + 1
    assert given["train"] == [(row["input_ids"], row["labels"]) for row in data.train.rows]


def test_what_fairseq_translated_is_scored_as_ours(data):
    """Perfect translations score 100; those of the last model have names of their own."""
    tokens = {name: [row["labels"] for row in getattr(data, name).rows] for name in ("validation", "test")}
    wrong = [[*row[:-2], row[-1]] for row in tokens["test"]]
    told = {
        "translations": {
            "validation last": {"tokens": tokens["validation"], "nll": math.log(2)},
            "test last": {"tokens": wrong, "nll": 1.0},
            "test best": {"tokens": tokens["test"], "nll": 1.0},
        },
        **{"epochs": {}, "curve": [], "seconds": 1.0, "versions": {}, "hardware": "a machine"},
    }
    metrics = multi30k_oracle.score(RUN, told, data)["metrics"]
    assert metrics["validation_bleu"] == metrics["test_bleu_best"] == pytest.approx(100)
    assert metrics["validation_nll_bits"] == 1.0
    texts = data.tokenizer.batch_decode(wrong, skip_special_tokens=True)
    assert metrics["test_bleu"] == sacrebleu.corpus_bleu(texts, [data.test.targets]).score < 100


def test_the_page_has_the_starts_of_the_record():
    record = json.loads((RECIPES / "records/multi30k/starts.json").read_text())
    page = (DOCS / "multi30k.md").read_text()
    for run in record["runs"]:
        first, second = run["validation_nll"]
        bits = second / math.log(2)
        assert f"| {run['start']} | {run['seed']} | {first:.2f} | {second:.2f} | {bits:.2f} |" in page
    best = record["thrown_away"]["best_validation_nll"]
    lowest = {
        base: min(nll for name, nll in best.items() if name.startswith(base)) for base in ("all", "local", "sgp")
    }
    without = min(nll for name, nll in best.items() if name.startswith("local_sgd_beta0.0"))
    told = (
        f"{lowest['all']:.2f} of AR-Adam, {lowest['local']:.2f} of Local Adam with β = 0.2 ({without:.2f} without), "
    )
    assert f"{len(best)} tuning runs" in page
    seconds = record["thrown_away"]["seconds_per_pass"]
    spans = {
        words: [seconds[name] for name in best if name.startswith(base)]
        for base, words in (("all", "AR-Adam"), ("local", "Local Adam"), ("sgp", "SGP"))
    }
    assert ", ".join(f"{words} {min(own):.0f} to {max(own):.0f}" for words, own in spans.items()) in page
    assert told + f"{lowest['sgp']:.2f} of SGP" in " ".join(page.replace("\n>", " ").split())


def test_the_page_has_fairseq_beside_ar_adam():
    page = (DOCS / "multi30k.md").read_text()
    assert multi30k_oracle.table(RECORDS) in page
    ours, theirs = beside_fairseq()
    assert {record["run"]["inner_lr"] for record in theirs} == {0.005}
    mean = statistics.mean(record["metrics"]["test_bleu_tokenised_lowercase_mean_of_5"] for record in theirs)
    last = [record["metrics"]["test_bleu"] for record in theirs]
    seeds = [record["seed"] for record in ours]
    gaps = showing.paired_differences(ours, theirs, "test_bleu_mean_of_5")
    *first, last_gap = (f"{gap:+.2f}" for gap in gaps)
    assert max(map(abs, gaps)) < 1, "the first half of claim 1, in all five pairs"
    words, results = " ".join(page.split()), page_of("results")
    assert seeds == [1, 2, 3, 4, 5]
    average, half = statistics.mean(gaps), half_interval(gaps)
    assert f"is {', '.join(first)} and {last_gap} BLEU (sacreBLEU, seeds 1 to 5): {average:+.2f} on average" in words
    three, half_of_three = statistics.mean(gaps[:3]), half_interval(gaps[:3])
    assert f"from {three - half_of_three:+.1f} to {three + half_of_three:+.1f}, could not decide" in words
    assert half_of_three > 1 > abs(average) + half, "why there are five"
    reached = [statistics.mean(r["metrics"]["test_bleu_mean_of_5"] for r in side) for side in (ours, theirs)]
    low, high = average - half, average + half
    assert results.count("{:.2f} against {:.2f}, 5 seeds; [from {:+.1f} to {:+.1f}]".format(*reached, low, high)) == 2
    lowercase = [
        statistics.mean(r["metrics"]["test_bleu_tokenised_lowercase_mean_of_5"] for r in side)
        for side in (ours, theirs)
    ]
    assert "nor does fairseq: {:.2f} and {:.2f} |".format(*lowercase) in results
    ends = [f"{gap:+.2f}" for gap in showing.paired_differences(ours, theirs, "test_bleu")]
    assert f"Of the last checkpoint the pairs are {', '.join(ends[:4])} and {ends[4]}: two are over 1." in words
    by_last, by_best = (
        interval(showing.paired_differences(ours, theirs, metric)) for metric in ("test_bleu", "test_bleu_best")
    )
    assert f"by the last checkpoint the interval is {by_last}" in results
    assert f"by the best it is {by_best}. Neither is within 1." in results
    over = [gap.lstrip("+-") for gap in ends if abs(float(gap)) > 1]
    assert f"two of claim 1's five pairs differ by more than 1 ({over[0]} and {over[1]})" in results
    assert f"interval, from {low:+.1f} to {high:+.1f}, is within 1" in words
    assert f"fairseq itself stays {41.02 - mean:.1f} below 41.02" in words
    assert f"fairseq's own last ones differ by {max(last) - min(last):.1f} between {len(theirs)} seeds" in words


def test_the_page_has_the_runs_at_the_published_size():
    """Each is within 1 of the figure, and ended by itself."""
    page, words, results = (DOCS / "multi30k.md").read_text(), page_of("multi30k"), page_of("results")
    assert multi30k_tables.at_the_published_size(RECORDS) in page
    found = [json.loads(path.read_text()) for path in (RECORDS / "multi30k/published").glob("*.json")]
    records = sorted(found, key=lambda record: record["seed"])

    def listed(of_each):
        *first, last = map(of_each, records)
        return f"{', '.join(first)} and {last}" if first else last

    def bleu(which):
        return listed(lambda record: f"{record['metrics'][which]:.2f}")

    seeds = ("one seed", "two seeds", "three seeds")[len(records) - 1]
    reached = bleu(multi30k_tables.AS_PUBLISHED)
    assert f"within 1, {seeds}: {reached}. In 24 passes no" in results
    assert f"({seeds} at its size {'has' if len(records) == 1 else 'have'} {reached})" in results.replace("> ", "")
    of_others = [bleu(f"test_bleu_tokenised_lowercase{which}") for which in ("", "_best", "_mean_of_5")]
    assert (
        "Tokenised and lower-cased, the last model alone has {}, the best by NLL {}, the mean of five {}.".format(
            *of_others
        )
        in words
    )
    passes, updates = listed(lambda record: str(len(record["curve"]))), listed(lambda record: f"{record['steps']:,}")
    assert f"ended by itself after {passes} passes, {updates} of 8,000 updates: ten in a row had no" in words
    hours = listed(lambda record: f"{record['seconds'] / 3600:.1f}")
    assert f"{hours} hours on two cores" in words
    in_all = sum(record["seconds"] for record in records) / 3600
    assert f"of fairseq; {in_all:.0f} of two cores at the published size |" in words
    of_a_pass = [record["seconds"] / len(record["curve"]) for record in records]
    assert f"Beside other work it took {min(of_a_pass):.0f} to {max(of_a_pass):.0f} s." in words
    for record in records:
        assert abs(record["metrics"][multi30k_tables.AS_PUBLISHED] - multi30k_tables.FIGURE) < 1
        assert len(record["curve"]) == record["epochs_of_models"]["best"][0] + 10
        assert (record["num_beams"], record["length_penalty"]) == (5, 1.0)
    short = beside_fairseq()[0][0]
    tokens = [run["tokens_per_update"]["target"] for run in (short, records[0])]
    assert short["steps"] * tokens[0] < 8000 * tokens[1] / 5
    assert "24 passes: less than a fifth of the target tokens of 8,000 updates of its size" in results


def test_fairseqs_records_are_of_the_runs_of_ours():
    """The same data, tokens per update and search as AR-Adam's of the same seed, and every score of theirs."""
    for ours, theirs in zip(*beside_fairseq(), strict=True):
        for name in ("dataset_sha256", "tokens_per_update", "train_rows", "num_beams", "length_penalty", "vocab_size"):
            assert theirs[name] == ours[name], name
        assert len(theirs["curve"]) == theirs["run"]["epochs"]
        assert {name for name in ours["metrics"] if "bleu" in name} <= theirs["metrics"].keys()


def test_the_page_has_the_tables_and_the_verdicts():
    """Of claims 2 and 3 every pair's difference is behind the verdict; claim 1 is tested beside fairseq."""
    page = page_of("results")
    for table in (multi30k_tables.beside_the_paper(RECORDS), multi30k_tables.differences_table(RECORDS)):
        assert table in (DOCS / "results.md").read_text()
    assert min(nll("Local Adam minus AR-Adam")) > 0, "claim 2, first half: it holds in all three pairs"
    assert sorted(gap > 0 for gap in nll("Local Adam, β = 0.1 minus 0")) == [False, True, True], "second half: lost"
    assert min(nll("of 2 workers, β = 0.2 minus 0")) > 0, "claim 3, first half: lost in all three pairs"
    assert len(worse := nll("of 2 workers, β = 0.5 minus 0.2")) == 3
    assert min(worse) > 0, "second half: it holds in all three pairs"
    assert min(nll("SGP minus AR-Adam")) > 0 > max(nll("SGP minus Local Adam")), "SGP is between them"
    assert max(nll("AR-Adam at half the rate, minus AR-Adam")) < 0, "further ahead"
    bleu = {name: multi30k_tables.differences(name, "test_bleu_mean_of_5", RECORDS) for name in multi30k_tables.PAIRS}
    ends = {name: half_interval(gaps) for name, gaps in bleu.items() if len(gaps) == 3}
    without_0 = [name for name, half in ends.items() if abs(statistics.mean(bleu[name])) > half]
    ruined = ["of 2 workers, β = 0.5 minus 0", "of 2 workers, β = 0.5 minus 0.2"]
    assert without_0 == ["SGP minus AR-Adam", *ruined]
    assert len(ends) == 13, "they are thirteen intervals"
    last = {name: multi30k_tables.differences(name, "test_bleu", RECORDS) for name in ends}
    assert [name for name, gaps in last.items() if abs(statistics.mean(gaps)) > half_interval(gaps)] == [
        *("Local Adam of 2 workers minus AR-Adam", "Local Adam of 2 workers minus AR-Adam at half the rate"),
        *("of 2 workers, β = 0.2 minus 0", *ruined),
    ], "those of two workers do not"
    assert sum("2 workers" in name for name in ends) == 5, "all of them"
    quoted = [
        mean_and_interval(last[name], 2, "+")
        for name in (
            *("Local Adam of 2 workers minus AR-Adam", "Local Adam of 2 workers minus AR-Adam at half the rate"),
            "of 2 workers, β = 0.2 minus 0",
        )
    ]
    assert "{} minus AR-Adam, {} minus it at half the rate, and {} for β = 0.2.".format(*quoted) in page
    orders = zip(
        *(nll(f"{name} minus AR-Adam") for name in ("Local Adam of 2 workers", "SGP", "Local Adam")), strict=True
    )
    assert all(0 < two < sgp < four for two, sgp, four in orders), "the order is the same in every pair"
    far = [
        statistics.mean(nll(f"{of} minus AR-Adam at half the rate"))
        for of in ("Local Adam", "SGP", "Local Adam of 2 workers")
    ]
    assert f"{far[0]:.3f} nats per token at AR-Adam's own best rate" in page
    assert f"{far[1]:.3f} nats, beside the same rate; BLEU" in page
    cost = statistics.mean(nll("of 2 workers, β = 0.2 minus 0"))
    assert f"{far[2]:.3f} nats behind; β = 0.2 costs {cost:.3f} more" in page
    better = nll("AR-Adam at half the rate, minus AR-Adam")
    assert f"better by {-statistics.mean(better):.2f} NLL over three seeds; its BLEU is the same" in page_of(
        "multi30k"
    )
    assert abs(statistics.mean(bleu["AR-Adam at half the rate, minus AR-Adam"])) < 0.05, "the same"
    slow = "Local Adam, β = 0.1 minus 0"
    assert f"changes Local Adam's NLL by {statistics.mean(nll(slow)):+.3f}." in page
    kept, tested = (
        multi30k_tables.differences(slow, metric, RECORDS)
        for metric in ("validation_nll_mean_of_5", "test_nll_mean_of_5")
    )
    behind = multi30k_tables.differences("Local Adam minus AR-Adam", "validation_nll_mean_of_5", RECORDS)
    assert max(kept) < 0, "lower in all three"
    share = -statistics.mean(kept) / statistics.mean(behind)
    assert f"lower in all three, by {-statistics.mean(kept):.3f}: {100 * share:.0f} % of its distance" in page
    assert f"On the test set it is {statistics.mean(tested):.3f} higher." in page


def test_the_page_tells_what_tuning_has_chosen():
    page, rule = page_of("multi30k"), page_of("from_ddp")
    tuned = [json.loads(path.read_text()) for path in (RECORDS / "multi30k/tuning").glob("*.json")]
    best = {base: (one.inner_lr, one.outer_momentum) for base, one in choose(tuned, "multi30k").items()}
    assert best == {"all_reduce": (0.0025, None), "local_sgd": (0.005, 0.1), "sgp": (0.005, 0.1)}
    found = {
        (record["base"], record["inner_lr"], record["outer_momentum"]): record["metrics"]["validation_nll"]
        for record in tuned
    }
    for base, (rate, _) in best.items():
        rates = sorted(lr for name, lr, beta in found if name == base and not beta)
        assert rates[0] < rate < rates[-1], "inside the grid"
    assert {record["run"]["epochs"] for record in tuned} == {12}
    assert "0.005 / (1 − 0.4) is 0.0083" in page
    local = {key[1:]: value for key, value in found.items() if key[0] == "local_sgd"}
    assert local[0.005, 0.4] == pytest.approx(local[0.01, 0.0], abs=0.13), "nearly that of a rate of 0.01"
    assert found["sgp", 0.005, 0.4] < found["sgp", 0.005, 0.0] + 0.1, "SGP bears 0.4"
    assert local[0.005, 0.0] < local[0.0025, 0.5] < local[0.0025, 0.0]
    betas = ", ".join(f"{local[0.005, beta]:.3f}" for beta in (0.1, 0.2, 0.4))
    assert f"NLL {betas} against {local[0.005, 0.0]:.3f}" in rule
    assert f"NLL {local[0.0025, 0.5]:.3f}; {local[0.0025, 0.0]:.3f} without slow momentum at that rate" in rule
    assert f"stable, but above {local[0.005, 0.0]:.3f} |" in rule
    assert f"was {local[0.0025, 0.5] - local[0.005, 0.0]:.2f} NLL worse than β = 0 at the full rate" in rule
    spans = []
    for rate in (0.005, 0.0025):
        looks = [json.loads(path.read_text())["curve"][11] for path in TABLE1.glob(f"all_reduce_*_lr{rate}_*.json")]
        ahead = [look["validation_nll"] for look in looks]
        assert {look["epoch"] for look in looks} == {12}
        assert len(ahead) == {0.005: 5, 0.0025: 3}[rate]
        assert max(ahead) < local[0.005, 0.0]
        spans.append(f"of {min(ahead):.2f} to {max(ahead):.2f}")
    assert f"have a validation NLL {spans[0]} at a rate of 0.005, and {spans[1]} at 0.0025" in page


def test_the_pages_tell_what_two_workers_have_shown():
    page, rule, links = (page_of(name) for name in ("results", "from_ddp", "two_machines"))
    ruined, some, without = (
        [one for path in sorted(SWEEP.glob(f"local_sgd_beta{beta}_*.json")) if (one := json.loads(path.read_text()))]
        for beta in (0.5, 0.2, 0.0)
    )
    ends = [record["metrics"]["validation_nll"] for record in ruined]
    early = [record["curve"][1]["validation_nll"] for own in (ruined, without) for record in own]
    bleus = [statistics.mean(record["metrics"]["test_bleu_mean_of_5"] for record in own) for own in (ruined, without)]
    assert (
        "ruins every run: NLL {:.3f}, {:.3f} and {:.3f}. It shows early: {:.2f}, {:.2f} and {:.2f} against {:.2f}, "
        "{:.2f} and {:.2f} after two passes".format(*ends, *early)
    ) in page
    assert "all ruined: NLL {:.3f}, {:.3f}, {:.3f}; BLEU {:.1f}, and {:.1f} without |".format(*ends, *bleus) in rule
    assert "BLEU {:.1f}, and {:.1f} with β = 0 (three seeds)".format(*bleus) in links
    numbers = [", ".join(f"{record['metrics']['validation_nll']:.3f}" for record in own) for own in (some, without)]
    assert "NLL {}; {} without: worse in all".format(*numbers) in rule
    cost = nll("of 2 workers, β = 0.2 minus 0")
    mean, half = statistics.mean(cost), half_interval(cost)
    told = f"the NLL is {mean:.2f} nats per token higher ({mean - half:.3f} to {mean + half:.3f}, three seeds)"
    assert f"With β = 0.2 {told}." in links


def test_the_page_tells_how_long_a_pass_takes():
    """Of one core; those at the published size have several."""
    folders = [folder for folder in (RECORDS / "multi30k").iterdir() if folder.name != "published"]
    records = [json.loads(path.read_text()) for folder in folders for path in folder.glob("*.json")]
    passes = [record["seconds"] / record["run"]["epochs"] for record in records]
    told = f"takes {min(passes):.0f} to {max(passes):.0f} s (median {statistics.median(passes):.0f})"
    assert told in page_of("multi30k")
    _, theirs = beside_fairseq()
    hours = [round(sum(record["seconds"] for record in own) / 3600) for own in (records, theirs)]
    assert "26 hours of one core; {} so far, and {} of fairseq; ".format(*hours) in page_of("multi30k")


def test_the_page_says_who_is_ahead_in_validation_nll():
    gaps = showing.paired_differences(*beside_fairseq(), "validation_nll")
    assert len(gaps) == 5
    assert min(gaps) > 0
    mean, half = statistics.mean(gaps), half_interval(gaps)
    said = f"its last epoch is lower in all five pairs, by {mean:.3f} ({mean - half:.3f} to {mean + half:.3f})"
    assert said in page_of("multi30k")


def interval(values):
    middle, half = statistics.mean(values), half_interval(values)
    return f"[{middle - half:+.2f}, {middle + half:+.2f}]"


def beside_fairseq():
    """Our records of the runs that fairseq has made too, and fairseq's, by seed."""
    theirs = [json.loads(path.read_text()) for path in sorted((RECORDS / "multi30k").glob("fairseq_*.json"))]
    ours = [found for record in theirs if (found := reproduce.find_record(run_of(record["run"]), RECORDS))]
    return ours, theirs


def page_of(name):
    """Its words, however its lines are broken."""
    return " ".join((DOCS / f"{name}.md").read_text().split())


def nll(pair):
    return multi30k_tables.differences(pair, "validation_nll", RECORDS)


def test_differences_are_of_the_same_seeds(tmp_path):
    """Seeds 1 and 2 of both, 38 - 37 and 36 - 36.5; seed 3 of one alone is left out."""
    first, other = multi30k_tables.PAIRS["SGP, β = 0.1 minus 0"]
    for run, values in ((first, (38.0, 36.0)), (other, (37.0, 36.5, 40.0))):
        for seed, value in enumerate(values, 1):
            record = {"run": asdict(run(seed)), "metrics": dict.fromkeys(multi30k_tables.METRICS, value)}
            (tmp_path / f"{run(seed).name}.json").parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / f"{run(seed).name}.json").write_text(json.dumps(record))
    half = 12.706 * 1.5 / 2  # Student's t of one degree of freedom, times the standard error
    low, high = 0.25 - half, 0.25 + half
    assert multi30k_tables.differences_table(tmp_path).splitlines()[2:] == [
        f"| SGP, β = 0.1 minus 0 | +0.250 [{low:+.3f}, {high:+.3f}] | +1.000, -0.500 | +0.361 "
        f"| +0.25 [{low:+.2f}, {high:+.2f}] | +1.00, -0.50 |"
    ]


def test_the_table_pairs_seeds(tmp_path):
    """Ours 38 and 36 of seeds 1 and 2, theirs 37, 36.5 and 40 of 1 to 3: the pairs differ by +1 and -0.5."""
    (tmp_path / "multi30k" / "table1").mkdir(parents=True)

    def write(name, seed, value, rate=0.005):
        run = make_run("table1", "multi30k", "all_reduce", 0.0, rate, seed)
        metrics = dict.fromkeys(multi30k_oracle.COMPARED.values(), value)
        (tmp_path / f"{name or run.name}.json").write_text(json.dumps({"run": asdict(run), "metrics": metrics}))

    for seed, ours, theirs in ((1, 38.0, 37.0), (2, 36.0, 36.5), (3, None, 40.0)):
        write(f"multi30k/fairseq_lr0.005_seed{seed}", seed, theirs)
        if ours:
            write(None, seed, ours)
    last = multi30k_oracle.table(tmp_path).splitlines()[3]
    half = 12.706 * 1.5 / 2  # Student's t of one degree of freedom, times the standard error
    gap = f"+0.2500 [{0.25 - half:+.4f}, {0.25 + half:+.4f}] (2)"
    assert last == f"| last | 37.8333 ± 1.8930 (3) | 37.0000 ± 1.4142 (2) | {gap} |"
    write("multi30k/fairseq_lr0.0025_seed1", 1, 30.0, 0.0025)
    first, _, second = multi30k_oracle.table(tmp_path).partition("\n\nLearning rate 0.005:\n\n")
    assert first.splitlines()[0] == "Learning rate 0.0025:"
    assert "| last | 30.0000 (1) | not run |" in first, "ours at another rate is no partner"
    assert second.splitlines()[3] == last


def test_the_table_at_the_published_size(tmp_path):
    """Seeds of 40 and 43 are 41.5 on average, 12.706 x 1.5 on either side: Student's t of one degree of freedom."""
    first, second, _ = published("multi30k")
    for run, bleu in ((first, 40.0), (second, 43.0)):
        metrics = {multi30k_tables.AS_PUBLISHED: bleu, **dict.fromkeys(multi30k_tables.BESIDE, 1.5)}
        record = {"run": asdict(run), "seed": run.seed, "curve": [{}] * 30, "steps": 1860, "metrics": metrics}
        record["epochs_of_models"] = {"best": [20]}
        (tmp_path / f"{run.name}.json").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{run.name}.json").write_text(json.dumps(record))
    assert multi30k_tables.at_the_published_size(tmp_path).splitlines()[2:] == [
        "| 1 | 30, 20 | 1,860 | 40.00 | -1.02 | 1.50 | 1.500 | 1.500 |",
        "| 2 | 30, 20 | 1,860 | 43.00 | +1.98 | 1.50 | 1.500 | 1.500 |",
        "| mean |  |  | 41.50 [22.44, 60.56] | +0.48 [-18.58, +19.54] "
        "| 1.50 [1.50, 1.50] | 1.500 [1.500, 1.500] | 1.500 [1.500, 1.500] |",
    ]
