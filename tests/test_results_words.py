"""What docs/results.md says of slow momentum with gossip: the figures of its words, and what they do not show."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import datasets

from records import half_interval
from studies import showing
from translation.sources import SHIPPED

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "recipes/records"
PAGE = " ".join((ROOT / "docs/results.md").read_text().split())


def runs(folder, base):
    """(without slow momentum, with it)."""
    found = [json.loads(path.read_text()) for path in sorted((RECORDS / folder).glob(f"{base}_*.json"))]
    return [[record for record in found if record["slowmo"] == slow] for slow in (False, True)]


def gains(folder, base, metric):
    """With slow momentum minus without, seed by seed; their mean and the ends of its 95 % interval."""
    without, with_it = runs(folder, base)
    differences = showing.paired_differences(with_it, without, metric)
    return differences, *span(differences)


def span(numbers):
    """Their mean and the ends of its 95 % interval."""
    mean, half = statistics.mean(numbers), half_interval(numbers)
    return mean, mean - half, mean + half


def minus(number, digits):
    return f"{number:+.{digits}f}".replace("-", "−")


def test_claims_2_and_3_of_images():
    """OSGP loses accuracy in every pair, SGP shows no change; training loss falls with Local SGD alone."""
    table = "image_classification/table1"
    lost, mean, low, high = gains(table, "osgp", "test_accuracy")
    assert max(lost) < 0
    assert high < 0
    points = f"{-100 * mean:.2f} points"
    assert f"It loses {points} ({-100 * high:.2f} to {-100 * low:.2f}), and is lower in all {len(lost)} pairs." in PAGE
    assert f"OSGP loses {points} [{-100 * high:.2f}, {-100 * low:.2f}] |" in PAGE
    machines = " ".join((ROOT / "docs/two_machines.md").read_text().split())
    assert f"adds nothing to SGP, and costs OSGP {points}." in machines
    _, _, low, high = gains(table, "sgp", "test_accuracy")
    assert low < 0 < high
    assert f"above 0 ({minus(100 * low, 2)} to {minus(100 * high, 2)} points)" in PAGE
    local, mean, low, high = gains(table, "local_sgd", "training_loss")
    assert max(local) < 0, "lower in all 8 pairs"
    assert f"lower in all {len(local)} pairs, by {-mean:.3f} (interval {-high:.3f} to {-low:.3f})" in PAGE
    for base in ("sgp", "osgp"):
        differences, mean, low, high = gains(table, base, "training_loss")
        assert low < 0 < mean < high, "no difference is shown, and the mean is higher"
        lower = sum(difference < 0 for difference in differences)
        said = f"{minus(mean, 4)}, with an interval from {minus(low, 4)} to {minus(high, 4)}, and lower in {lower} of"
        assert f"{base.upper()}: {said} {len(differences)} pairs" in PAGE


def test_what_becomes_of_the_inner_state_on_images():
    """The table of its section, and what the first page of results, the README and docs/two_machines.md have of it."""
    reset, slow = runs("image_classification/table1", "local_sgd")
    kept, kept_slow = (
        [record for record in side if record["run"]["inner_state"] == "maintain"]
        for side in runs("image_classification/sweep", "local_sgd")
    )
    rows = {
        "keeping it, without slow momentum": (kept, reset),
        "slow momentum with a reset, against none and the state kept": (slow, kept),
        "slow momentum where the state is kept": (kept_slow, kept),
        "with slow momentum, keeping it against a reset": (kept_slow, slow),
    }
    spans = {}
    for words, pair in rows.items():
        points = [100 * gain for gain in showing.paired_differences(*pair, "test_accuracy")]
        assert len(points) == 8
        spans[words] = span(points)
        cells = [minus(number, 2) for number in spans[words]]
        assert f"| {words} | {cells[0]} | {cells[1]} to {cells[2]} |" in PAGE
    *shown, unclear = spans.values()
    assert min(low for _, low, _ in shown) > 0
    assert unclear[1] < 0 < unclear[2]
    mean, low, high = spans["slow momentum where the state is kept"]
    assert f"| and where the momentum is kept? | {mean:.2f} points, [{low:.2f}, {high:.2f}] (rate" in PAGE
    readme, machines = (" ".join((ROOT / name).read_text().split()) for name in ("README.md", "docs/two_machines.md"))
    assert f"where both keep momentum, {mean / 100:+.4f}." in readme
    assert f"Where both keep SGD's momentum it gains {mean:.2f}." in machines
    gain, low, high = (
        100 * number for number in gains("image_classification/table1", "local_sgd", "test_accuracy")[1:]
    )
    assert f"8 seeds: {gain:.2f} points where SGD's momentum is reset [{low:.2f}, {high:.2f}] |" in PAGE
    worst_first = (reset, kept, slow, kept_slow)
    for metric, sign in (("test_accuracy", 1), ("training_loss", -1), ("validation_nll", -1)):
        means = [sign * statistics.mean(record["metrics"][metric] for record in row) for row in worst_first]
        assert means == sorted(means), "they order the rows alike"
    first = json.loads((RECORDS / "image_classification/first_runs.json").read_text())["gains"]
    points = [100 * gain for gain in first["local_sgd, β 0.7, slow momentum where the state is kept"]["test_accuracy"]]
    cells = [minus(number, 2) for number in span(points)]
    assert f"brought nothing: {cells[0]} ({cells[1]} to {cells[2]}), with β = 0.7" in PAGE


def test_what_came_out_otherwise_in_the_first_runs_of_images():
    record = json.loads((RECORDS / "image_classification/first_runs.json").read_text())
    spans = [
        span([100 * gain for gain in record["gains"][words]["test_accuracy"]])
        for words in ("local_sgd, β 0.7", "osgp, β 0.5")
    ]
    mean, low, high = spans[0]
    assert f"β = 0.7 for Local SGD, which gained {mean:.2f} points ({low:.2f} to {high:.2f})" in PAGE.replace(" >", "")
    mean, low, high = (minus(number, 2) for number in spans[1])
    assert f"OSGP's change was within noise, {mean} ({low} to {high})" in PAGE.replace(" >", "")
    then, now = (run["validation_accuracy"] for run in record["one_machine"]["runs"])
    said = f"a validation accuracy of {then:.4f} by the rule of then and {now:.4f} by today's"
    assert said in PAGE.replace(" >", "")
    tuned = json.loads((RECORDS / "image_classification/tuning/local_sgd_beta0.7_lr0.4_seed0.json").read_text())
    assert tuned["metrics"]["validation_accuracy"] == now


def test_why_osgp_loses_is_a_guess():
    """Single runs of SGP say where to look: without the exact average the loss is lower by more than the seeds' sd."""
    table = runs("image_classification/table1", "sgp")[1]
    sweep = {
        record["name"].partition("lr0.4_")[2]: record["metrics"]["training_loss"]
        for record in runs("image_classification/sweep", "sgp")[1]
    }
    reset, kept, no_average = (sweep[f"{name}seed1"] for name in ("", "maintain_", "no-average_"))
    spread = statistics.stdev(record["metrics"]["training_loss"] for record in table)
    assert reset - no_average > spread
    assert f"training loss {reset:.3f}, {kept:.3f} where the inner momentum is kept, {no_average:.3f} without" in PAGE
    assert f"The sd over seeds is {spread:.3f}, so the exact average may be what costs" in PAGE
    differ = {(r["slowmo"], r["exact_average"]) for side in runs("image_classification/table1", "osgp") for r in side}
    assert differ == {(False, False), (True, True)}, "OSGP's rows differ in the exact average too"


def test_the_summary_s_gains_on_help_text():
    nll, bleu = (
        {base: gains("translation/table1", base, metric) for base in ("local_sgd", "sgp")}
        for metric in ("validation_nll", "test_bleu")
    )
    assert all(max(falls) < 0 for falls, *_ in nll.values()), "in every pair"
    _, _, low, high = bleu["local_sgd"]
    assert low < 0 < high, "within noise"
    said = f"| NLL falls in every pair, by {-nll['local_sgd'][1]:.2f} on average; BLEU is within noise |"
    assert f"| does Local Adam gain, help text, 8 workers? {said}" in PAGE
    _, mean, low, _ = bleu["sgp"]
    assert low > 0
    _, _, low, high = gains("translation/table1", "sgp", "test_bleu_mean_of_5")
    assert low < 0 < high, "within noise"
    said = f"| NLL falls by {-nll['sgp'][1]:.2f}; BLEU {mean:+.1f}, or within noise (mean of five)"
    assert f"| does SGP gain, help text, 8 workers? {said}; rows differ in the" in PAGE


def test_the_rule_for_adam_has_the_figures_of_help_text():
    page = (ROOT / "docs/from_ddp.md").read_text()
    of_seed_0 = {
        beta: json.loads((RECORDS / f"translation/tuning/local_sgd_beta{beta}_lr0.008_seed0.json").read_text())
        for beta in ("0.0", "0.3", "0.5", "0.7")
    }
    nll = {beta: record["metrics"]["validation_nll"] for beta, record in of_seed_0.items()}
    assert min(nll, key=nll.get) == "0.5"
    assert f"much worse, NLL {nll['0.7']:.3f} against {nll['0.0']:.3f} without slow momentum |" in page
    falls, mean, *_ = gains("translation/table1", "local_sgd", "validation_nll")
    assert max(falls) < 0
    assert f"NLL lower in all three pairs, by {-mean:.2f} on average; BLEU within noise |" in page


def test_the_claims_on_help_text():
    nll, bleu, loss = (
        [gains("translation/table1", base, metric) for base in ("local_sgd", "sgp")]
        for metric in ("validation_nll", "test_bleu", "training_loss")
    )
    local, mean, low, high = bleu[0]
    assert sorted(gap > 0 for gap in local) == [False, True, True]
    assert f"by {-nll[0][1]:.2f} (interval {-nll[0][3]:.3f} to {-nll[0][2]:.3f})" in PAGE
    assert f"in two pairs of three and {-min(local):.2f} lower in the third ({mean:+.1f} on average" in PAGE
    assert f"interval {minus(low, 1)} to {high:+.1f})" in PAGE
    _, mean, low, high = bleu[1]
    assert min(bleu[1][0]) > 0
    assert f"higher in every pair, {mean:+.1f} on average. The interval, {low:+.1f} to {high:+.1f}, is above 0" in PAGE
    _, mean, low, high = gains("translation/table1", "sgp", "test_bleu_mean_of_5")
    assert low < 0 < high
    assert f"of the mean of five the gain is {mean:+.1f} ({minus(low, 1)} to {high:+.1f})" in PAGE
    assert f"Its NLL is lower by {-nll[1][1]:.2f} ({-nll[1][3]:.3f} to {-nll[1][2]:.3f})" in PAGE
    assert max(*loss[0][0], *loss[1][0]) < 0, "claim 3: lower in every pair"
    words = [f"{-mean:.2f} ({-high:.3f} to {-low:.3f}) for" for _, mean, low, high in loss]
    assert f"lower in every pair, by {words[0]} Local Adam and {words[1]} SGP" in PAGE
    (without, of_without), (with_it, of_with) = behind_all_reduce("translation/table1", "validation_nll")
    assert f"is {without:.3f} behind AR-Adam's without slow momentum {told(of_without, 3)}" in PAGE
    assert f"and {with_it:.3f} with it {told(of_with, 3)}" in PAGE


def test_how_far_local_sgd_is_behind_on_images():
    """Over the seeds that all-reduce has."""
    (without, of_without), (with_it, of_with) = behind_all_reduce("image_classification/table1", "test_accuracy", -100)
    assert f"is {without:.2f} points behind all-reduce in test accuracy {told(of_without, 2)}" in PAGE
    assert f"with it {with_it:.2f} {told(of_with, 2)}" in PAGE
    short = ["{:.1f}, {:.1f}".format(*ends) for ends in (of_with, of_without)]
    summary = f"{with_it:.1f} points with slow momentum [{short[0]}], {without:.1f} without [{short[1]}]"
    assert f"| on images {summary} |" in PAGE


def behind_all_reduce(folder, metric, scale=1):
    """Without slow momentum and with it: the mean over the seeds that all-reduce has too, and its interval."""
    ahead = runs(folder, "all_reduce")[0]
    found = []
    for side in runs(folder, "local_sgd"):
        gaps = [scale * gap for gap in showing.paired_differences(side, ahead, metric)]
        assert len(gaps) == len(ahead)
        mean, half = statistics.mean(gaps), half_interval(gaps)
        found.append((mean, (mean - half, mean + half)))
    return found


def told(ends, digits):
    return "({:.{digits}f} to {:.{digits}f})".format(*ends, digits=digits)


def test_how_much_of_the_help_text_is_in_train():
    """Of lines of 12 words a side at most: which of the German sequences of four words are in any of train's lines."""
    found = {}
    for split in ("train", "validation", "test"):
        rows = datasets.Dataset.from_parquet(str(SHIPPED / f"{split}.parquet"), keep_in_memory=True)["translation"]
        pairs = [(row["de"].split(), row["en"].split()) for row in rows]
        kept = [de for de, en in pairs if split == "train" or max(len(de), len(en)) <= 12]
        found[split] = [tuple(line[i : i + 4]) for line in kept for i in range(len(line) - 3)]
    known = set(found["train"])
    test, validation = (round(100 * statistics.mean(g in known for g in found[s])) for s in ("test", "validation"))
    said = (
        f"{test} % of the German sequences of four words in test are also in train, {validation} % of those in valid"
    )
    assert said in PAGE


def test_the_summary_s_gains_of_gossip():
    """None is shown, on images and on Multi30k, of whose three pairs NLL falls in one."""
    pairs, _, low, high = gains("image_classification/table1", "sgp", "test_accuracy")
    assert low < 0 < high
    assert f"| do SGP and OSGP gain, images, 8 workers? | SGP: no gain is shown ({len(pairs)} seeds); OSGP" in PAGE
    nll, bleu = (gains("multi30k/table1", "sgp", name) for name in ("validation_nll", "test_bleu_mean_of_5"))
    assert sorted(gap < 0 for gap in nll[0]) == [False, False, True]
    assert nll[2] < 0 < nll[3], "within noise"
    assert bleu[2] < 0 < bleu[3], "within noise"
    assert "| does SGP gain, Multi30k, 4 workers? | no gain is shown, at β = 0.1 (3 seeds); " in PAGE
    assert f"SGP's NLL changes by {nll[1]:+.3f}: two pairs are higher, one is lower." in PAGE
    assert PAGE.count("rows differ in the exact average too |") == 2


def test_what_make_train_has_come_to():
    """One seed, with slow momentum and by all-reduce."""
    ours, all_reduce = (
        json.loads((RECORDS / f"image_classification/{name}.json").read_text())
        for name in ("make_train", "make_train_all_reduce")
    )
    assert (ours["slowmo"], ours["base"], all_reduce["base"]) == (True, "local_sgd", "all_reduce")
    assert ours["steps"] == all_reduce["steps"]
    assert (ours["seed"], ours["train_rows"], ours["test_rows"]) == (all_reduce["seed"], 10_000, 2_000)
    first, second = (record["metrics"]["test_accuracy"] for record in (ours, all_reduce))
    readme, page = ((ROOT / name).read_text() for name in ("README.md", "docs/two_machines.md"))
    assert f"accuracy {first:.3f}\n" in readme
    assert f"[All-reduce: {second:.3f}]" in readme
    assert f"has accuracy {first:.4f} with β = 0.5 and {second:.4f} with all-reduce" in page
    assert f"a difference of {round(2_000 * (second - first))} in 2,000 images" in " ".join(page.split())


def test_why_runs_on_help_text_differ_from_the_first_ones():
    """Equal bits by either code without slow momentum; with it the rule has changed, and processors round."""
    record = json.loads((RECORDS / "translation/reruns.json").read_text())
    of_rows = {}
    for run in record["runs"]:
        of_rows.setdefault((run["row"], run["instructions"]), {}).setdefault(run["commit"][:7], run["validation_nll"])
    wide = {row: list(nlls.values()) for (row, kind), nlls in of_rows.items() if kind == "AVX-512"}
    without = {row: nlls for row, nlls in wide.items() if "β" not in row}
    assert {row.split(",")[0] for row in without} == {"all_reduce", "local_sgd", "sgp"}
    assert all(len(nlls) == 2 and len(set(nlls)) == 1 for nlls in without.values())
    adam = "all_reduce, γ 0.002"
    narrow = of_rows[adam, "AVX2"].popitem()[1]
    assert f"AR-Adam has {narrow:.4f} instead of {wide[adam][0]:.4f}" in PAGE
    (before, at, now), (first, last) = (wide[f"{base}, γ 0.008, β 0.5"] for base in ("local_sgd", "sgp"))
    assert before != at == now, "by that commit alone"
    assert f"Local Adam has {now:.4f} instead of {before:.4f}, and SGP {last:.4f} instead of {first:.4f}" in PAGE
