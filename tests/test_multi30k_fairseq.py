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

from records import half_interval
from small_text import RUN, TINY, write_pairs
from studies import multi30k_oracle, reproduce, showing, small_runs, small_translation
from studies.plan import choose, make_run, run_of
from translation.model import MODEL_SIZES

RECIPES = Path(__file__).parents[1] / "recipes"


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
        **{"epochs": {}, "curve": [], "seconds": 1.0, "versions": {}},
    }
    metrics = multi30k_oracle.score(RUN, told, data)["metrics"]
    assert metrics["validation_bleu"] == metrics["test_bleu_best"] == pytest.approx(100)
    assert metrics["validation_nll_bits"] == 1.0
    texts = data.tokenizer.batch_decode(wrong, skip_special_tokens=True)
    assert metrics["test_bleu"] == sacrebleu.corpus_bleu(texts, [data.test.targets]).score < 100


def test_the_page_has_the_starts_of_the_record():
    record = json.loads((RECIPES / "records/multi30k/starts.json").read_text())
    page = (RECIPES.parent / "docs/results.md").read_text()
    for run in record["runs"]:
        first, second = run["validation_nll"]
        assert f"| {run['start']} | {run['seed']} | {first:.2f} | {second:.2f} |" in page
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
    folder = RECIPES / "records"
    page = (RECIPES.parent / "docs/results.md").read_text()
    assert multi30k_oracle.table(folder) in page
    theirs = [json.loads(path.read_text()) for path in sorted((folder / "multi30k").glob("fairseq_*.json"))]
    assert {record["run"]["inner_lr"] for record in theirs} == {0.005}
    mean = statistics.mean(record["metrics"]["test_bleu_tokenised_lowercase_mean_of_5"] for record in theirs)
    last = [record["metrics"]["test_bleu"] for record in theirs]
    ours = [found for record in theirs if (found := reproduce.find_record(run_of(record["run"]), folder))]
    seeds = [record["seed"] for record in ours]
    gaps = showing.paired_differences(ours, theirs, "test_bleu_mean_of_5")
    *first, last_gap = (f"{gap:+.2f}" for gap in gaps)
    assert max(map(abs, gaps)) < 1, "the first half of claim 1"
    words = " ".join(page.split())
    assert seeds == [1, 2, 3]
    average, half = statistics.mean(gaps), half_interval(gaps)
    assert f"is {', '.join(first)} and {last_gap} BLEU (sacreBLEU, seeds 1, 2 and 3): {average:+.2f} on avera" in words
    reached = [statistics.mean(r["metrics"]["test_bleu_mean_of_5"] for r in side) for side in (ours, theirs)]
    low, high = average - half, average + half
    assert "{:.2f} against {:.2f}, 3 seeds; [from {:+.1f} to {:+.1f}]".format(*reached, low, high) in words
    ends = [f"{gap:+.2f}" for gap in showing.paired_differences(ours, theirs, "test_bleu")]
    assert f"Of the last checkpoint the pairs are {ends[0]}, {ends[1]} and {ends[2]}: the first is over 1." in words
    assert [abs(float(gap)) > 1 for gap in ends] == [True, False, False]
    assert f"interval from {low:+.1f} to {high:+.1f} is wide" in words
    assert f"fairseq itself stays {41.02 - mean:.1f} below it" in words
    assert f"fairseq's own last ones differ by {max(last) - min(last):.1f} between {len(theirs)} seeds" in words


def test_the_page_tells_how_far_tuning_is():
    """Local Adam's best rate is the middle one of three, and AR-Adam's seeds are ahead of it after as many passes."""
    folder = RECIPES / "records" / "multi30k"
    tuned = [json.loads(path.read_text()) for path in (folder / "tuning").glob("local_sgd_beta0.0_*.json")]
    nll = {record["inner_lr"]: record["metrics"]["validation_nll"] for record in tuned}
    assert sorted(nll) == [0.0025, 0.005, 0.01]
    assert choose(tuned, "multi30k")["local_sgd"].inner_lr == 0.005 == min(nll, key=nll.get)
    passes = {record["run"]["epochs"] for record in tuned}
    ahead = [json.loads(path.read_text())["curve"][11] for path in (folder / "table1").glob("all_reduce_*.json")]
    assert passes == {look["epoch"] for look in ahead} == {12}
    ahead_nll = [look["validation_nll"] for look in ahead]
    assert max(ahead_nll) < nll[0.005]
    words = " ".join((RECIPES.parent / "docs/results.md").read_text().split())
    rates = tuned_rates(folder / "tuning", "local_sgd"), tuned_rates(folder / "tuning", "sgp")
    told = "At 0.0025, 0.005 and 0.01 Local Adam's NLL is {}, {} and {}, and SGP's {}, {} and {}."
    assert told.format(*(f"{nll:.3f}" for own in rates for nll in own)) in words
    assert all(min(own) == own[1] for own in rates), "inside the grid"
    lowest, low, middle, high = tuned_rates(folder / "tuning", "all_reduce", (0.00125, 0.0025, 0.005, 0.01))
    assert low == min(lowest, low, middle, high), "inside the grid"
    told = f"{lowest:.3f}, {low:.3f}, {middle:.3f} and {high:.3f} at 0.00125, 0.0025, 0.005 and 0.01"
    assert f"**AR-Adam is best at 0.0025, inside its grid too:** {told}" in words
    lower, published_rate = (
        metrics(folder / "tuning", f"all_reduce_beta0.0_lr{rate}_epochs12_seed{{}}.json", 0)
        for rate in (0.0025, 0.005)
    )
    ahead = lower["test_bleu_mean_of_5"] - published_rate["test_bleu_mean_of_5"]
    assert f"by {middle - low:.2f} NLL and {ahead:.1f} BLEU after 12 passes" in words
    slow = [json.loads(path.read_text()) for path in sorted((folder / "tuning").glob("local_sgd_beta0.[1-9]_*.json"))]
    ends = {(record["outer_momentum"], record["inner_lr"]): record["metrics"]["validation_nll"] for record in slow}
    assert {record["run"]["epochs"] for record in slow} == {12}
    told = [f"{ends[beta, 0.005]:.3f} with β = {beta}" for beta in (0.1, 0.2, 0.4)]
    assert f"NLL {nll[0.005]:.3f} without, {told[0]}, {told[1]} and {told[2]}" in words
    half = f"With β = 0.5 at 0.0025 it is {ends[0.5, 0.0025]:.3f}: below the {nll[0.0025]:.3f} without"
    assert half in words
    assert nll[0.005] < ends[0.5, 0.0025] < nll[0.0025]
    rule = " ".join((RECIPES.parent / "docs/from_ddp.md").read_text().split())
    assert f"NLL {', '.join(f'{ends[beta, 0.005]:.3f}' for beta in (0.1, 0.2, 0.4))} against {nll[0.005]:.3f}" in rule
    assert f"NLL {ends[0.5, 0.0025]:.3f}; {nll[0.0025]:.3f} without slow momentum at that rate" in rule
    assert f"stable, but above {nll[0.005]:.3f} |" in rule
    assert f"was {ends[0.5, 0.0025] - nll[0.005]:.2f} NLL worse than β = 0 at the full rate" in rule
    lowest, highest = (f"{find(ahead_nll):.2f}" for find in (min, max))
    assert f"three seeds have a validation NLL of {lowest} to {highest} after as many passes" in words
    for seed in seeds_of(folder / "table1", LOCAL):
        assert told_pair(folder / "table1", LOCAL, AR, seed) in words


def test_the_page_has_sgps_slow_momentum_tuned():
    """β = 0.1 is best of 0.1, 0.2 and 0.4, and better than none; and its pairs with Local Adam and with itself."""
    folder = RECIPES / "records" / "multi30k"
    words = " ".join((RECIPES.parent / "docs/results.md").read_text().split())
    beta, name = (0.0, 0.1, 0.2, 0.4), "sgp_beta{}_lr0.005_epochs12_seed{{}}.json"
    nll = {one: metrics(folder / "tuning", name.format(one), 0)["validation_nll"] for one in beta}
    assert nll[0.1] == min(nll.values())
    tuned = [json.loads(path.read_text()) for path in (folder / "tuning").glob("*.json")]
    best = {base: (one.inner_lr, one.outer_momentum) for base, one in choose(tuned, "multi30k").items()}
    assert best == {"all_reduce": (0.0025, None), "local_sgd": (0.005, 0.1), "sgp": (0.005, 0.1)}
    told = [f"{nll[one]:.3f} with β = {one}" for one in beta[1:]]
    assert f"NLL {nll[0.0]:.3f} without, {told[0]}, {told[1]} and {told[2]}." in words
    sgp, slow = "sgp_beta0.0_lr0.005_seed{}.json", "sgp_beta0.1_lr0.005_seed{}.json"
    rows = folder / "table1"
    assert (seeds_of(rows, sgp), seeds_of(rows, slow)) == ([1, 2, 3], [1, 2])
    for seed in (1, 2, 3):
        assert told_pair(rows, sgp, LOCAL, seed) in words
        behind, between, ahead = (metrics(rows, one, seed) for one in (LOCAL, sgp, AR))
        assert ahead["validation_nll"] < between["validation_nll"] < behind["validation_nll"]
    nll, bleu = (gaps(rows, sgp, LOCAL, key) for key in ("validation_nll", "test_bleu_mean_of_5"))
    told = f"On average {nll[0]} NLL, with an interval {nll[1]}, and {bleu[0]} BLEU, {bleu[1]}"
    assert f"{told}: by BLEU three pairs show no difference." in words
    nll, bleu = (gaps(rows, sgp, AR, key) for key in ("validation_nll", "test_bleu_mean_of_5"))
    assert f"Against AR-Adam it is {nll[0]} NLL, {nll[1]}, and {bleu[0]} BLEU, {bleu[1]}." in words
    assert f"against SGP without {told_pair(rows, slow, sgp, 1)} and {told_pair(rows, slow, sgp, 2)}." in words
    bleu = gaps(rows, slow, sgp, "test_bleu_mean_of_5", (1, 2))
    assert f"higher in both, by {bleu[0][1:]}, with an interval {bleu[1]}." in words
    lower, higher = (metrics(rows, slow, seed)["test_bleu"] - metrics(rows, sgp, seed)["test_bleu"] for seed in (1, 2))
    assert f"it is {-lower:.2f} lower in one, and {higher:.2f} higher in the other." in words


def tuned_rates(folder, base, rates=(0.0025, 0.005, 0.01)):
    """Its NLL at each learning rate of the grid, ascending."""
    found = [json.loads(path.read_text()) for path in folder.glob(f"{base}_beta0.0_*.json")]
    nll = {record["inner_lr"]: record["metrics"]["validation_nll"] for record in found}
    assert sorted(nll) == list(rates)
    return [nll[rate] for rate in sorted(nll)]


LOCAL, AR = "local_sgd_beta0.0_lr0.005_seed{}.json", "all_reduce_beta0.0_lr0.005_seed{}.json"
TWO = "local_sgd_beta{}_lr0.005_workers2_batch1024_seed{{}}.json"


def metrics(folder, name, seed):
    return json.loads((folder / name.format(seed)).read_text())["metrics"]


def seeds_of(folder, name):
    found = [seed for seed in (1, 2, 3) if (folder / name.format(seed)).exists()]
    assert found
    return found


def gaps(folder, name, other, key, seeds=(1, 2, 3)):
    """Of two settings, on the same seeds: the mean of their differences, and its interval, in words."""
    found = [metrics(folder, name, seed)[key] - metrics(folder, other, seed)[key] for seed in seeds]
    mean, half, digits = statistics.mean(found), half_interval(found), 3 if "nll" in key else 2
    return f"{mean:+.{digits}f}", f"from {mean - half:+.{digits}f} to {mean + half:+.{digits}f}"


def told_pair(folder, name, other, seed):
    """As the page tells of two records of one seed; the second may lie beside the first's folder."""
    pair = metrics(folder, name, seed), metrics(folder, other, seed)
    nll, bleu = ([one[key] for one in pair] for key in ("validation_nll", "test_bleu_mean_of_5"))
    words = "NLL {:.3f} against {:.3f}, BLEU (mean of 5) {:.2f} against {:.2f}".format(*nll, *bleu)
    return f"{words} (seed {seed})"


def test_the_page_tells_what_two_workers_have_shown():
    folder = RECIPES / "records" / "multi30k" / "sweep"
    without, some, ruined = (TWO.format(beta) for beta in (0.0, 0.2, 0.5))
    page, rule, links = (
        " ".join((RECIPES.parent / f"docs/{page}.md").read_text().split())
        for page in ("results", "from_ddp", "two_machines")
    )
    assert seeds_of(folder, ruined) == [1]
    assert seeds_of(folder, some) == seeds_of(folder, without) == [1, 2, 3]
    first = metrics(folder, ruined, 1), metrics(folder, without, 1)
    nll, bleu = ([one[key] for one in first] for key in ("validation_nll", "test_bleu_mean_of_5"))
    said = "NLL {:.3f} against {:.3f} without slow momentum, BLEU (mean of 5) {:.2f} against {:.2f}."
    assert said.format(*nll, *bleu) in page
    second = [
        json.loads((folder / name.format(1)).read_text())["curve"][1]["validation_nll"] for name in (ruined, without)
    ]
    assert "It shows early: {:.2f} against {:.2f} after two passes".format(*second) in page
    assert "ruined: NLL {:.3f}, and {:.3f} without; BLEU {:.1f} and {:.1f} |".format(*nll, *bleu) in rule
    assert "BLEU {:.1f}, and {:.1f} with β = 0".format(*bleu) in links
    pairs = [(metrics(folder, some, seed), metrics(folder, without, seed)) for seed in (1, 2, 3)]
    lost, bleus = (
        [one[key] - other[key] for one, other in pairs] for key in ("validation_nll", "test_bleu_mean_of_5")
    )
    assert min(lost) > 0, "claim 3, first half"
    average, half = statistics.mean(lost), half_interval(lost)
    said = f"On average {average:+.3f} NLL, with an interval from {average - half:+.3f} to {average + half:+.3f}"
    assert f"{said}, and {statistics.mean(bleus):+.2f} BLEU" in page
    assert first[0]["validation_nll"] > pairs[0][0]["validation_nll"], "second half"
    behind = []
    for seed in (1, 2, 3):
        assert told_pair(folder, some, without, seed) in page
        assert told_pair(folder, without, f"../table1/{AR}", seed) in page
        one, other = (metrics(folder, name, seed)["validation_nll"] for name in (without, f"../table1/{AR}"))
        behind.append(one - other)
    assert f"are {min(behind):.2f} to {max(behind):.2f} NLL behind AR-Adam" in page
    numbers = [", ".join(f"{one['validation_nll']:.3f}" for one in pair) for pair in zip(*pairs, strict=True)]
    assert "NLL {}; {} without: worse in all".format(*numbers) in rule
    cost = [f"{-gain:.1f}" for gain in bleus]
    assert f"β = 0.2 cost {cost[0]}, {cost[1]} and {cost[2]} BLEU (three seeds)" in links


def test_the_page_tells_of_slow_momentum_with_four_workers():
    folder, slow = RECIPES / "records" / "multi30k" / "table1", LOCAL.replace("beta0.0", "beta0.1")
    page = " ".join((RECIPES.parent / "docs/results.md").read_text().split())
    seeds = seeds_of(folder, slow)
    assert seeds == [1, 2, 3]
    nll, bleu = (
        [metrics(folder, slow, seed)[key] - metrics(folder, LOCAL, seed)[key] for seed in seeds]
        for key in ("validation_nll", "test_bleu_mean_of_5")
    )
    assert sorted(gap > 0 for gap in nll) == [False, True, True], "claim 2, second half: in every pair"
    for seed in seeds:
        assert told_pair(folder, slow, LOCAL, seed) in page
    mean, half = statistics.mean(bleu), half_interval(bleu)
    said = f"On average {statistics.mean(nll):+.3f} NLL and {mean:+.2f} BLEU, with an interval from"
    assert f"{said} {mean - half:+.2f} to {mean + half:+.2f}: no effect" in page
    kept, behind, tested = (
        [metrics(folder, one, seed)[key] - metrics(folder, other, seed)[key] for seed in seeds]
        for one, other, key in (
            (slow, LOCAL, "validation_nll_mean_of_5"),
            (LOCAL, AR, "validation_nll_mean_of_5"),
            (slow, LOCAL, "test_nll_mean_of_5"),
        )
    )
    assert max(kept) < 0, "lower in all three"
    assert f"lower in all three, by {-statistics.mean(kept):.3f}: a twenty-seventh of its distance" in page
    assert round(-statistics.mean(behind) / statistics.mean(kept)) == 27
    assert f"On the test set it is {statistics.mean(tested):.3f} higher." in page


def test_the_table_pairs_seeds(tmp_path):
    """Ours 38 and 36 of seeds 1 and 2, theirs 37, 36.5 and 40 of 1 to 3: the pairs differ by +1 and -0.5."""
    (tmp_path / "multi30k" / "table1").mkdir(parents=True)

    def write(name, seed, value):
        run = make_run("table1", "multi30k", "all_reduce", 0.0, 0.005, seed)
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
