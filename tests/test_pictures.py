"""
The pictures: every mark and every figure in a title is the records', what is committed is what is drawn now, and it
can be read: nothing overlaps, nothing is cut off, ticks are plain.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from itertools import combinations
from math import sqrt
from pathlib import Path

import draw
import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

import pictures
import records
from image import train as image_recipe
from studies import drawing

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"

T = {2: 4.303, 4: 2.776, 7: 2.365}  # Student's two-sided 95 % points, by degrees of freedom
OURS_BY_2 = "slowmo_hf local_sgd, slowmo, maintained, overlapped by 2, int8"
OURS_BY_4 = "slowmo_hf local_sgd, slowmo, maintained, overlapped by 4, int8"
TORCHFT, ACCELERATE, DDP = "torchft DiLoCo, delayed", "accelerate LocalSGD", "ddp"


@pytest.fixture(scope="module")
def drawn():
    return {name: make() for name, make in draw.PICTURES.items()}


def rows_of(name):
    return json.loads((ROOT / f"benchmarks/records/{name}.json").read_text())["rows"]


def values(rows, system, rho, metric):
    return [row[metric] for row in rows if (row["system"], row["rho"]) == (system, rho)]


def metrics(task, study, name, metric, scale=1.0):
    """By seed, of the records whose file name is `name` and a seed."""
    paths = (ROOT / f"recipes/records/{task}/{study}").glob(f"{name}_seed*.json")
    found = (json.loads(path.read_text()) for path in paths)
    return {record["seed"]: scale * record["metrics"][metric] for record in found}


def differences(with_it, without):
    return [with_it[seed] - without[seed] for seed in sorted(with_it)]


def interval(numbers):
    """Mean and half of its 95 % interval."""
    numbers = list(numbers)
    return statistics.mean(numbers), T[len(numbers) - 1] * statistics.stdev(numbers) / sqrt(len(numbers))


def bars(axis, along):
    """(mean, half of the interval or None, full or open) of every dot, along x (0) or y (1)."""
    found = []
    for container in axis.containers:
        line, _, stems = container
        mean = line.get_xydata()[0][along]
        half = None
        if stems:
            ((low, high),) = (segment[:, along] for segment in stems[0].get_segments())
            half = (high - low) / 2
            assert (low + high) / 2 == pytest.approx(mean)
        full = line.get_markerfacecolor() != pictures.PAPER
        assert full == (half is not None), "an open dot is one run"
        found.append((mean, half))
    return found


def check_bars(found, expected):
    assert len(found) == len(expected)
    for (mean, half), (mean_there, half_there) in zip(found, expected, strict=True):
        assert mean == pytest.approx(mean_there, abs=1e-6)
        assert half == (None if half_there is None else pytest.approx(half_there, rel=1e-3))


def title(figure):
    return figure.get_suptitle().replace("\n", " ")


def note(figure):
    return figure.get_supxlabel().replace("\n", " ")


# ---- what is committed ----


@pytest.mark.parametrize("name", draw.PICTURES)
def test_what_is_committed_is_what_is_drawn(name, drawn, tmp_path):
    """The same bytes; under another matplotlib, which sets text by other rules, the same words and figures."""
    pictures.save(drawn[name], tmp_path / "now.svg")
    now, committed = (
        (folder / file).read_text() for folder, file in ((tmp_path, "now.svg"), (PICTURES, f"{name}.svg"))
    )
    if f"Matplotlib v{matplotlib.__version__}," in committed:
        assert now == committed, f"{name}.svg is not what python docs/pictures/draw.py draws: run it."
    words = [re.findall(r"<!-- (.*?) -->", text, re.DOTALL) for text in (now, committed)]
    assert words[0] == words[1]
    assert "dc:date" not in committed


def test_the_folder_has_these_pictures_and_the_docs_show_no_others():
    assert {path.stem for path in PICTURES.glob("*.svg")} == draw.PICTURES.keys()
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "benchmarks/README.md", ROOT / "README.md"]
    shown = {
        (page.parent / link).resolve()
        for page in pages
        for link in re.findall(r"!\[[^\]]*\]\(([^)]+\.(?:svg|png))\)", page.read_text())
    }
    assert shown, "no page has a picture"
    assert shown <= {PICTURES / f"{name}.svg" for name in draw.PICTURES}


def test_the_command_draws_them_again(tmp_path, capsys):
    draw.main(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.svg" for name in draw.PICTURES}
    assert len(capsys.readouterr().out.splitlines()) == len(draw.PICTURES)


# ---- it can be read ----


def texts_of(figure):
    """Those that are seen, with their boxes in pixels."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    beyond = set()
    for ticks in (ticks for axis in figure.axes for ticks in (axis.xaxis, axis.yaxis)):
        low, high = sorted(ticks.get_view_interval())
        beyond |= {tick.label1 for tick in ticks.get_major_ticks() if not low <= tick.get_loc() <= high}
    found = []
    for text in set(figure.findobj(matplotlib.text.Text)) - beyond:
        box = text.get_window_extent(canvas.get_renderer())
        if text.get_visible() and text.get_text().strip() and box.width:
            found.append((text.get_text(), box))
    return found


@pytest.mark.parametrize("name", draw.PICTURES)
def test_no_text_overlaps_or_is_cut_off(name, drawn):
    width, height = drawn[name].get_size_inches() * drawn[name].dpi
    found = texts_of(drawn[name])
    for text, box in found:
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= width, text
        assert box.y1 <= height, text
    for (one, box), (other, there) in combinations(found, 2):
        across = min(box.x1, there.x1) - max(box.x0, there.x0)
        down = min(box.y1, there.y1) - max(box.y0, there.y0)
        assert min(across, down) < 1.5, f"{one!r} lies on {other!r}"


@pytest.mark.parametrize("name", draw.PICTURES)
def test_tick_labels_are_plain_numbers(name, drawn):
    FigureCanvasAgg(drawn[name]).draw()
    for axis in drawn[name].axes:
        for ticks in (axis.xaxis, axis.yaxis):
            assert ticks.get_offset_text().get_text() == ""
            for label in ticks.get_ticklabels():
                assert not re.search(r"\$|\\|\d[eE]|×", label.get_text()), label.get_text()


def test_panels_that_are_compared_have_one_range(drawn):
    assert len({axis.get_ylim() for axis in drawn["sweep"].axes}) == 1
    assert len({axis.get_xlim() for axis in drawn["final_losses"].axes}) == 1


def test_names_are_moved_apart_by_hand():
    assert pictures.apart([0.0, 0.5], 0.1) == [0.0, 0.5]
    assert pictures.apart([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])
    assert pictures.apart([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])


# ---- the figures are the records' ----


def test_a_title_that_the_records_do_not_bear_out_is_refused():
    assert draw.true(True, "a title") == "a title"
    with pytest.raises(ValueError, match="do not bear out this title any more: 'a title'"):
        draw.true(False, "a title")


def test_round(drawn):
    """Blocks as long as the record's milliseconds, of two workers and the link."""
    found = rows_of("peers")
    (ddp,) = (row for row in found if (row["system"], row["rho"]) == ("ddp", 3.1))
    (ours,) = (row for row in found if (row["system"], row["rho"]) == ("slowmo_hf local_sgd, slowmo", 3.1))
    ratio = 12 * ours["seconds_per_step"] / ddp["seconds_per_step"]
    assert title(drawn["round"]) == f"12 local steps and one average take as long as {ratio:.1f} steps of DDP"
    assert f"{ours['hosts']} hosts" in note(drawn["round"])
    (axis,) = drawn["round"].axes
    lanes = {}
    for block in axis.patches:
        lanes.setdefault(round(block.get_y() + block.get_height() / 2, 6), []).append(
            (block.get_x(), block.get_width(), block.get_facecolor())
        )
    worker, link, other, ours_1, ours_link, ours_2 = (lanes[lane] for lane in sorted(lanes))
    assert worker == other
    assert ours_1 == ours_2
    colour = {name: matplotlib.colors.to_rgba(getattr(pictures, name)) for name in ("OURS", "FAINT", "LINK", "DARK")}
    steps = [start for start, _, face in worker if face == colour["DARK"]]
    assert steps == pytest.approx([1e3 * n * ddp["seconds_per_step"] for n in range(5)])
    assert [1e3 * ddp["allreduce_seconds"]] * 5 == pytest.approx([length for _, length, _ in link])
    local = [length for _, length, face in ours_1 if face == colour["OURS"]][:12]
    assert local == pytest.approx([1e3 * ours["compute_seconds_per_step"]] * 12)
    ((start, length, _),) = ours_link
    assert start == pytest.approx(12e3 * ours["compute_seconds_per_step"])
    assert start + length == pytest.approx(12e3 * ours["seconds_per_step"])


def test_loss_over_seconds(drawn):
    """Line by line the means look by look, the band's edges, and the ends, which the names and the title repeat."""
    rows = [row for row in rows_of("peers_same_seconds") if row["rho"] == 3.1]
    figure = drawn["loss_over_seconds"]
    (axis,) = figure.axes
    ends = {}
    systems = (OURS_BY_2, TORCHFT, ACCELERATE, DDP)
    for system, line, band in zip(systems, axis.lines, axis.collections, strict=True):
        curves = [row["curve"] for row in rows if row["system"] == system]
        shortest = min(map(len, curves))
        looks = [[curve[n] for curve in curves] for n in range(shortest)]
        if max(map(len, curves)) > shortest:
            looks.append([curve[-1] for curve in curves])
        expected = [
            [statistics.mean(look[name] for look in there) for name in ("seconds", "validation_loss")]
            for there in looks
        ]
        assert line.get_xydata() == pytest.approx(np.array(expected))
        corners = {tuple(corner) for corner in band.get_paths()[0].vertices.round(9)}
        for (seconds, _), there in zip(expected, looks, strict=True):
            losses = [look["validation_loss"] for look in there]
            assert {(round(seconds, 9), round(edge, 9)) for edge in (min(losses), max(losses))} <= corners
        ends[system] = statistics.mean(values(rows, system, 3.1, "final_validation_loss"))
        assert line.get_ydata()[-1] == pytest.approx(ends[system])
    assert sorted(text.get_text().split()[-1] for text in axis.texts) == sorted(f"{end:.3f}" for end in ends.values())
    everybody = {row["system"] for row in rows if "slowmo_hf" not in row["system"]}
    best = min(statistics.mean(values(rows, system, 3.1, "final_validation_loss")) for system in everybody)
    assert title(figure) == (
        f"On a slow link slowmo_hf ends at a loss of {ends[OURS_BY_2]:.3f}, the best peer at {best:.3f}"
    )
    assert "the seconds of DDP's 240 steps" in note(figure)
    assert {row["curve"][-1]["step"] for row in rows if row["system"] == DDP} == {240}
    assert "Means of 5 seeds (accelerate 3)" in note(figure)
    assert "−0.0071 [−0.0114, −0.0028]" in note(figure), "docs/when.md's"
    ratios = [
        ours / theirs
        for ours, theirs in zip(
            values(rows, OURS_BY_2, 3.1, "seconds_to_target"),
            values(rows, TORCHFT, 3.1, "seconds_to_target"),
            strict=True,
        )
    ]
    assert f"{min(ratios):.2f} to {max(ratios):.2f} of torchft's seconds" in note(figure)


def test_final_losses(drawn):
    rows, figure = rows_of("peers_same_seconds"), drawn["final_losses"]
    for axis, rho in zip(figure.axes, (1.5, 3.1, 10.0), strict=True):
        systems = (OURS_BY_4 if rho == 10 else OURS_BY_2, TORCHFT, ACCELERATE, DDP)
        for n, system in enumerate(systems):
            losses = values(rows, system, rho, "final_validation_loss")
            dots, stroke = axis.lines[2 * n : 2 * n + 2]
            assert dots.get_xdata().tolist() == losses
            assert stroke.get_xdata()[0] == pytest.approx(statistics.mean(losses))
            assert axis.texts[n].get_text() == f"{statistics.mean(losses):.3f}"
        by_seed = {row["seed"]: row for row in rows if (row["system"], row["rho"]) == (systems[0], rho)}
        for row in rows:
            if row["rho"] == rho and "slowmo_hf" not in row["system"]:
                ours = by_seed[row["seed"]]["final_validation_loss"]
                assert ours < row["final_validation_loss"], "the title says so"
    assert title(figure) == "Given DDP's seconds, slowmo_hf's best setting ends lower than every peer, with every seed"
    assert "−0.0128 [−0.0647, 0.0391] at 10, where the interval of 2 seeds contains 0" in note(figure)


def test_utilisation(drawn):
    """Runs to a loss where a system has some on a link; the one timed run elsewhere."""
    trained, timed, figure = rows_of("peers_same_seconds"), rows_of("peers"), drawn["utilisation"]

    def shares(system, rho):
        return [
            100 * share
            for share in values(trained, system, rho, "utilisation") or values(timed, system, rho, "utilisation")
        ]

    (axis,) = figure.axes
    plain = "slowmo_hf local_sgd, slowmo"
    links = {OURS_BY_2: (1.5, 3.1, 10.0)}
    for system, line, band in zip(
        (OURS_BY_2, TORCHFT, ACCELERATE, DDP, plain), axis.lines, axis.collections, strict=True
    ):
        there = {
            rho: shares(OURS_BY_4 if (system, rho) == (OURS_BY_2, 10) else system, rho)
            for rho in links.get(system, (0.5, 1.5, 3.1, 10.0))
        }
        expected = [[rho, statistics.mean(own)] for rho, own in there.items()]
        assert line.get_xydata() == pytest.approx(np.array(expected))
        corners = {tuple(corner) for corner in band.get_paths()[0].vertices.round(9)}
        assert {(rho, round(edge(own), 9)) for rho, own in there.items() for edge in (min, max)} <= corners
    ours, ddp = (statistics.mean(shares(system, 3.1)) for system in (OURS_BY_2, DDP))
    assert title(figure) == f"On a slow link slowmo_hf computes {ours:.0f} % of the time, DDP {ddp:.0f} %"
    assert f"DDP there computes {shares(DDP, 0.5)[0]:.0f} % of the time" in note(figure)


def test_table1(drawn):
    """Rows and differences as docs/results.md has them, from the files."""
    pair = {
        name: [
            metrics("image_classification", "table1", f"{name}_beta{beta}_lr{lr}", "test_accuracy", 100)
            for beta in betas
        ]
        for name, betas, lr in (
            ("all_reduce", ("0.0",), 0.4),
            ("local_sgd", ("0.0", "0.5"), 0.4),
            ("sgp", ("0.0", "0.5"), 0.4),
            ("osgp", ("0.0", "0.5"), 0.2),
        )
    }
    levels, gains = drawn["table1"].axes
    check_bars(bars(levels, 0), [interval(seeds.values()) for both in pair.values() for seeds in both])
    found = {name: interval(differences(both[1], both[0])) for name, both in pair.items() if len(both) > 1}
    check_bars(bars(gains, 0), list(found.values()))
    assert [text.get_text() for text in gains.texts] == [
        "+1.00 [+0.86, +1.14]",
        "−0.03 [−0.49, +0.43]",
        "−0.35 [−0.57, −0.12]",
    ]
    assert [label.get_text() for label in levels.get_yticklabels()] == [
        "all-reduce\n5 seeds",
        "Local SGD\n8 seeds",
        "SGP\n5 seeds",
        "OSGP\n5 seeds",
    ]
    assert title(drawn["table1"]) == (
        f"Slow momentum changes test accuracy by {found['local_sgd'][0]:+.1f} points with Local SGD and "
        f"−{-found['osgp'][0]:.1f} points with OSGP; no change is shown with SGP (intervals contain 0)"
    )
    assert abs(found["sgp"][0]) < found["sgp"][1]
    assert -found["osgp"][0] > found["osgp"][1]


def test_translation(drawn):
    panels = iter(drawn["translation"].axes)
    gained = {}
    for metric in ("validation_nll", "test_bleu"):
        pair = {
            name: [metrics("translation", "table1", f"{name}_beta{beta}_lr0.008", metric) for beta in betas]
            for name, betas in (("all_reduce", ("0.0",)), ("local_sgd", ("0.0", "0.5")), ("sgp", ("0.0", "0.5")))
        }
        check_bars(bars(next(panels), 0), [interval(seeds.values()) for both in pair.values() for seeds in both])
        gained[metric] = {name: interval(differences(*reversed(pair[name]))) for name in ("local_sgd", "sgp")}
        check_bars(bars(next(panels), 0), list(gained[metric].values()))
    nll, bleu = gained["validation_nll"], gained["test_bleu"]
    assert all(mean + half < 0 for mean, half in nll.values())
    assert abs(bleu["local_sgd"][0]) < bleu["local_sgd"][1]
    assert bleu["sgp"][0] > bleu["sgp"][1]
    assert title(drawn["translation"]) == (
        f"Slow momentum lowers validation NLL by {-nll['local_sgd'][0]:.2f} with Local Adam and "
        f"{-nll['sgp'][0]:.2f} with SGP Slow momentum raises test BLEU by {bleu['sgp'][0]:.2f} with SGP; "
        "no change is shown with Local Adam (intervals contain 0)"
    )


def test_sweep(drawn):
    """Where the table has seeds of a setting they are its point, with a bar; elsewhere the one run."""

    def point(beta, tau=12, state=""):
        name = f"local_sgd_beta{beta}_lr0.4" + (f"_tau{tau}" if tau != 12 else "") + (f"_{state}" if state else "")
        studies = ("table1", "sweep") if (beta, tau, state) in ((0.0, 12, ""), (0.5, 12, "")) else ("sweep",)
        numbers = list(metrics("image_classification", studies[0], name, "test_accuracy", 100).values())
        return interval(numbers) if len(numbers) > 1 else (numbers[0], None)

    periods, momenta, states = drawn["sweep"].axes
    taus, betas = (3, 6, 12, 24, 48), (0.0, 0.2, 0.4, 0.5, 0.6, 0.8)
    check_bars(bars(periods, 1), [point(beta, tau) for beta in (0.0, 0.5) for tau in taus])
    check_bars(bars(momenta, 1), [point(beta) for beta in betas])
    assert [line.get_xdata()[0] for line in (container[0] for container in momenta.containers)] == list(betas)
    found = {
        container[0].get_xdata()[0]: bar for container, bar in zip(states.containers, bars(states, 1), strict=True)
    }
    expected = [point(beta, state=state) for state in ("", "maintain", "average") for beta in (0.0, 0.5)]
    check_bars([found[place] for place in sorted(found)], expected)
    gains = [point(0.5, tau)[0] - point(0.0, tau)[0] for tau in taus]
    assert title(drawn["sweep"]) == (
        f"Slow momentum is ahead at every period, 3 to 48 steps, by {min(gains):.1f} to {max(gains):.1f} points"
    )
    assert "Over seeds the sd is 0.2 to 0.6 points. Where they do not vary, τ is 12 and β 0.5." in note(drawn["sweep"])


def run_of(beta, seed, accuracy, base="local_sgd", **others):
    run = {"study": "table1", "task": "image_classification", "base": base, "outer_momentum": beta, "inner_lr": 0.4}
    run |= {"seed": seed, "sync_every": 12, "workers": 8, "inner_state": "auto", "exact_average": True, **others}
    return {
        "run": run,
        "seed": seed,
        "slowmo": beta > 0,
        "exact_average": run["exact_average"],
        "metrics": {"test_accuracy": accuracy},
    }


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        ([0.010, 0.012, 0.014], "Slow momentum raises test accuracy by 1.2 points with Local SGD"),
        ([-0.010, -0.012, -0.014], "Slow momentum lowers test accuracy by 1.2 points with Local SGD"),
        ([-0.010, 0.0, 0.012], "No change of test accuracy is shown with Local SGD (intervals contain 0)"),
        ([0.010], "Test accuracy: one run a row, no interval"),
    ],
)
def test_a_finding_says_what_its_interval_says(gains, said):
    found = [run_of(0.0, seed, 0.5) for seed in range(len(gains))]
    found += [run_of(0.7, seed, 0.5 + gain) for seed, gain in enumerate(gains)]
    assert title(drawing.pairs(found, "image_classification")) == said


def test_slow_momentum_that_is_not_ahead_everywhere_is_said_to():
    found = [
        run_of(beta, 1, 0.5 + beta * gain, sync_every=tau)
        for tau, gain in ((3, 0.1), (6, 0.1), (12, -0.1))
        for beta in (0.0, 0.5)
    ]
    assert title(drawing.sweep(found, "image_classification")) == "Slow momentum is ahead at 2 of 3 periods"


# ---- the recipes' --plot ----

HISTORY = [
    {"step": 4, "loss": 2.0, "slowmo/consensus_distance": 0.5, "slowmo/utilisation": 0.75, "slowmo/bytes_sent": 1e6},
    {"step": 6, "eval_accuracy": 0.25},
    {"step": 8, "loss": 1.0, "slowmo/consensus_distance": 0.25, "slowmo/utilisation": 0.5, "slowmo/bytes_sent": 2e6},
]
RECORD = {"base": "local_sgd", "slowmo": True, "outer_momentum": 0.5, "steps": 8, "workers": 2, "rounds": 4}
RECORD |= {"sync_every": 2, "seed": 42}


def panels_of(history, record):
    figure = records.training_figure(history, ("eval_accuracy", "test accuracy"), record)
    shown = {axis.get_title("left"): [line.get_xydata().tolist() for line in axis.lines] for axis in figure.axes}
    return figure, shown


def test_panels_of_a_training_by_hand():
    """Bytes add up, utilisation is in percent, and the title is the last accuracy."""
    figure, shown = panels_of(HISTORY, RECORD)
    assert shown == {
        "training loss": [[[4, 2.0], [8, 1.0]]],
        "test accuracy": [[[6, 0.25]]],
        "drift: consensus distance": [[[4, 0.5], [8, 0.25]]],
        "share of the time computing, %": [[[4, 75.0], [8, 50.0]]],
        "sent per worker so far, MB": [[[4, 1.0], [8, 3.0]]],
    }
    assert title(figure) == "Test accuracy 0.25 after 8 steps of 2 workers"
    assert note(figure) == "local_sgd, slow momentum 0.5; 4 rounds, one every 2 steps; one run, seed 42"


def test_panels_of_what_has_no_rounds_say_so():
    record = {**RECORD, "base": "all_reduce", "slowmo": False, "rounds": 0}
    figure, shown = panels_of([{"step": 4, "loss": 2.0}], record)
    assert [len(lines) for lines in shown.values()] == [1, 0, 0, 0, 0]
    assert [[text.get_text() for text in axis.texts] for axis in figure.axes] == [[]] + 4 * [["not in the log"]]
    assert title(figure) == "Test accuracy was not measured after 8 steps of 2 workers"
    assert note(figure) == "all_reduce, no slow momentum; no rounds; one run, seed 42"


@pytest.mark.slow
def test_the_image_recipe_fills_every_panel(tmp_path, monkeypatch):
    """What its log calls things is what the panels ask for."""
    drawn = []
    monkeypatch.setattr(
        image_recipe, "plot", lambda history, path, quality, record: drawn.append((history, quality, record))
    )
    flags = "--max_train_samples 256 --max_eval_samples 50 --width 4 --max_steps 8 --sync_every 2 --logging_steps 4"
    flags += " --eval_strategy steps --eval_steps 4 --disable_tqdm 1 --plot"
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split(), "--output_dir", str(tmp_path)])
    image_recipe.main()
    ((history, quality, record),) = drawn
    assert quality == ("eval_accuracy", "test accuracy")
    _, shown = panels_of(history, record)
    assert [len(lines) for lines in shown.values()] == [1] * 5
    assert [step for step, _ in shown["training loss"][0]] == [4, 8]
    accuracy = record["metrics"]["test_accuracy"]
    assert shown["test accuracy"][0][-1] == [8, accuracy]
    assert shown["sent per worker so far, MB"][0][-1] == [8, record["bytes_sent_per_worker"] / 1e6]
