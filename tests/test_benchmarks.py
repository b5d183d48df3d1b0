"""
The benchmark at a tiny size: its own forms agree with the package, its counts are right, its record says what it
measured.
"""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import columns
import round_cost
import round_parts
import speed
import start_cost
from harness import patience, run_workers
from hosts import why_not
from measuring import ratio
from round_parts import BenchmarkArguments, Textbook, outer_step_of

ROOT = Path(__file__).parent.parent
TINY = BenchmarkArguments(
    repeats=3,
    step_repeats=4,
    d_model=32,
    layers=1,
    vocab_size=64,
    step_width=16,
    step_tokens=64,
    lean_bucket_bytes=2**16,
    compute_seconds=0.05,
)


@pytest.fixture(scope="module")
def figures():
    return run_workers(round_cost.measure, 2, TINY)[0]


@pytest.mark.slow
def test_ratios_are_those_of_the_medians_beside_them(figures):
    step, rounds, exchange = figures["step"], figures["round"], figures["exchange"]
    pairs = [
        (step, "ours / bare", "ours", "bare", 4),
        (rounds, "round / parts, default", "round, default bucket_bytes", "sum of parts", 3),
        (rounds, "round / parts, lean", "round, lean bucket_bytes", "sum of parts", 3),
        (rounds, "textbook with temporaries / outer step", "textbook with temporaries", "outer step", 3),
        (rounds, "textbook in place / outer step", "textbook in place", "outer step", 3),
        (exchange, "sgp exchange / plain", "sgp exchange", "plain exchange", 3),
        (exchange, "osgp step / computation", "osgp step", "computation alone", 3),
    ]
    for section, name, above, below, n in pairs:
        assert section[name]["n"] == section[above]["n"] == n
        # medians are written in thousandths of a millisecond
        assert section[name]["ratio"] == pytest.approx(
            section[above]["median_ms"] / section[below]["median_ms"], rel=0.05
        ), name


def test_ratio_by_hand():
    """medians 3 and 2: 1.5; ratios of the repetitions 1, 1.5, 2: p10 = 1 + 0.2 · 0.5, p90 = 1.5 + 0.8 · 0.5."""
    assert ratio([2.0, 3.0, 4.0], [2.0, 2.0, 2.0], at_most=1.5) == {
        "n": 3, "ratio": 1.5, "p10": 1.1, "p90": 1.9, "target": "<= 1.5", "met": True
    }  # fmt: skip
    assert not ratio([2.0, 3.0, 4.0], [2.0, 2.0, 2.0], at_least=1.6)["met"]


@pytest.mark.slow
def test_a_round_sends_the_payload_and_little_more(figures):
    """
    Two processes in a ring: 2 (m-1)/m = 1 times the payload, 4 bytes for the consensus distance, a header under 1 KiB.
    """
    payload = 4 * figures["round"]["parameters"]
    assert payload < figures["round"]["bytes_sent_per_round_and_process"] <= payload + 4 + 1024


@pytest.mark.slow
def test_memory_is_counted_to_the_byte(figures):
    """
    Two fp32 copies, two messages with one element more each, 16 KiB for what is small; during a look one copy of the
    parameters more.
    """
    plain = [case for case in figures["memory"] if not case["shard_slow_state"]]
    assert len(plain) == 6
    for case in plain:
        copies = 2 * 4 * case["parameters"]
        buffer = min(4 * case["parameters"], 2 * min(16 * 2**20, case["bucket_bytes"] // 2)) + 4
        local = case["parameters"] * (2 if case["dtype"] == "bfloat16" else 4)
        between, look = case["between rounds"]["tensors"], case["while the average is looked at"]["tensors"]
        if case["dtype"] == "float32":
            assert copies + buffer <= between <= copies + buffer + round_cost.SMALL_BYTES
        assert between + local <= look <= between + local + round_cost.SMALL_BYTES
        assert case["after the look"]["tensors"] <= between + round_cost.SMALL_BYTES
        assert case["bytes_per_parameter"]["between rounds"] == pytest.approx(between / case["parameters"], abs=0.005)


@pytest.mark.slow
def test_sharded_slow_state_takes_its_share_of_memory(figures):
    """
    Two processes: half of two fp32 copies, four messages of a fifth of the bucket or of the parameters, 16 KiB for
    what is small.
    """
    sharded = [case for case in figures["memory"] if case["shard_slow_state"]]
    assert len(sharded) == 2
    for case in sharded:
        halves, messages = 4 * case["parameters"], 4 * min(4 * case["parameters"], case["bucket_bytes"]) // 5
        assert (
            halves + 0.9 * messages <= case["between rounds"]["tensors"] <= halves + messages + round_cost.SMALL_BYTES
        )


def test_three_forms_of_the_arithmetic_are_one():
    """Displacement d = 1e-3 twice, from velocity 0: every form gives a - d, then a - d - (0.5 + 1) d."""
    model = torch.nn.Linear(5, 3)
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = local_training_of_linear(model)
    outer_step = outer_step_of(optimizer)
    forms = [Textbook(start), Textbook(start)]
    for steps in (1, 2):
        outer_step()
        for textbook, form in zip(forms, ("with_temporaries", "in_place"), strict=True):
            textbook.averages = [anchor - 1e-3 for anchor in textbook.anchors]
            getattr(textbook, form)()
        expected = [p - (1e-3 if steps == 1 else 2.5e-3) for p in start]
        flat = torch.cat([p.view(-1) for p in expected])
        anchors = [
            a for group in optimizer.outer_loop.parts.slow.update.optimizer.param_groups for a in group["params"]
        ]
        torch.testing.assert_close(torch.cat([a.view(-1) for a in anchors]), flat, rtol=0, atol=1e-6)
        for textbook in forms:
            torch.testing.assert_close(torch.cat([a.view(-1) for a in textbook.anchors]), flat, rtol=0, atol=1e-6)


def local_training_of_linear(model):
    optimizer = round_cost.SlowMoOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        round_cost.SlowMoConfig(outer_momentum=round_parts.BETA, sync_every=1),
    )
    model(torch.zeros(1, 5))
    return optimizer


def test_a_round_of_parts_is_a_round():
    """
    copy_in puts the parameters side by side, arithmetic gives v = p and anchor = p - p = 0 from v = 0, copy_out hands
    p back.
    """
    params = [torch.arange(6.0).view(2, 3), torch.tensor([7.0])]
    parts = round_parts.Parts(params)
    parts.flat.zero_()
    parts.copy_in()
    parts.arithmetic()
    parts.copy_out()
    assert parts.flat.tolist() == parts.velocity.tolist() == [0, 1, 2, 3, 4, 5, 7]
    assert parts.anchor.tolist() == [0] * 7
    assert [t.tolist() for t in parts.received] == [t.tolist() for t in params]


@pytest.mark.slow
def test_the_command_writes_a_record(tmp_path):
    output = tmp_path / "record.json"
    command = [
        sys.executable,
        "benchmarks/round_cost.py",
        "--parts",
        "step",
        "--step_repeats",
        "2",
        "--step_width",
        "16",
    ]
    subprocess.run(
        [*command, "--output", str(output)], cwd=ROOT, check=True, capture_output=True, timeout=patience(150)
    )
    record = json.loads(output.read_text())
    assert record["command"].startswith("python benchmarks/round_cost.py --parts step")
    assert record["step"]["ours"]["n"] == 2
    assert "round" not in record


def test_the_committed_record_is_whole():
    record = json.loads((ROOT / "benchmarks/records/round_cost.json").read_text())
    assert {"command", "date", "hardware", "versions", "arguments", "step", "round", "exchange", "memory"} <= set(
        record
    )
    assert record["round"]["parameters"] == 60506624
    assert record["round"]["tensors"] == 131
    assert record["step"]["bare"]["median_ms"] >= 50
    for section in (record["step"], record["round"], record["exchange"]):
        for name, figure in section.items():
            if isinstance(figure, dict) and "n" in figure:
                assert figure["n"] >= 20, name
                assert all(math.isfinite(v) for v in figure.values() if isinstance(v, float)), name


def test_the_record_of_a_slow_link_is_whole():
    record = json.loads((ROOT / "benchmarks/records/exchange_cost_1gbit.json").read_text())
    assert "2 Gbit/s for both directions" in record["backend"]
    assert record["exchange"]["plain exchange"]["n"] >= 20
    needed_ms = 1e3 * 2 * 8 * 4 * record["exchange"]["parameters"] / 2e9
    assert record["exchange"]["plain exchange"]["median_ms"] == pytest.approx(needed_ms, rel=0.02), (
        "the link was what the record says"
    )


@pytest.mark.slow
def test_speed_compares_two_checkouts():
    """Of this one with itself, tiny: every part of every setting, and ratios of the medians beside them."""
    args = speed.SpeedArguments(restarts=1, turns=3, tensors=2, side=4)
    figures = speed.compare(args, {"new": ROOT / "src", "before": ROOT / "src"})
    assert set(figures) == set(speed.SETTINGS)
    for parts in figures.values():
        assert set(parts) == {"start", "local step", "round", "view"}
        for figure in parts.values():
            medians = [figure[name]["median_ms"] for name in ("new", "before")]
            assert min(medians) > 0
            assert figure["new / before"]["n"] == 3
            assert figure["new / before"]["ratio"] == pytest.approx(medians[0] / medians[1], rel=0.05)


@pytest.mark.slow
def test_trajectories_say_what_a_change_of_the_update_does(tmp_path):
    """This checkout beside a copy that forgets the velocity: all differ, but what has no slow momentum."""
    shutil.copytree(ROOT / "src" / "slowmo_hf", tmp_path / "slowmo_hf")
    rule = tmp_path / "slowmo_hf" / "algorithm" / "slow_momentum.py"
    rule.write_text(rule.read_text().replace("alpha=outer_momentum * lr_ratio", "alpha=0.0"))
    command = [sys.executable, str(ROOT / "benchmarks" / "trajectories.py"), "--before", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    said = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    same = {name for name, words in said.items() if words.strip() == "the same"}
    assert len(said) == 12
    assert same == {"double averaging", "DiLoCo"}


def test_the_record_of_columns_is_what_the_readme_says():
    record = json.loads((ROOT / "benchmarks" / "records" / "columns.json").read_text())
    words = (ROOT / "docs" / "benchmarks.md").read_text()
    for size, sides in record["figures"].items():
        found, seconds = sides["after / before"], [sides[side]["seconds"]["median"] for side in ("before", "after")]
        assert found["ratio"] <= 0.55
        assert sides["same_weights"]
        row = f"| {size} MiB | {seconds[0]:.3f} s | {seconds[1]:.3f} s | {found['ratio']:.3f} "
        assert f"{row}({found['p10']:.3f} to {found['p90']:.3f}) |" in words


@pytest.mark.parametrize("name", ["speed", "speed_columns"])
def test_the_record_of_speed_has_enough_turns(name):
    record = json.loads((ROOT / "benchmarks" / "records" / f"{name}.json").read_text())
    for parts in record["figures"].values():
        for figure in parts.values():
            assert figure["new / before"]["n"] >= 20
            assert figure["new / before"]["met"] == (figure["new / before"]["ratio"] <= speed.AT_MOST)
    words = (ROOT / "docs" / "benchmarks.md").read_text()
    for setting, parts in record["figures"].items():
        ratios = [f"{parts[part]['new / before']['ratio']:.3f}" for part in ("start", "local step", "round", "view")]
        assert f"| {setting} | {' | '.join(ratios)} |" in words


@pytest.mark.slow
def test_start_cost_compares_with_stock(monkeypatch):
    """A start of each, tiny, of new processes; of made-up ones the first turn is not counted, and they take turns."""
    args, asked = start_cost.StartArguments(repeats=1, layers=2, width=8, rows=2), []
    taken = {
        program: [start_cost.seconds(program, args), made_up] for program, made_up in (("ours", 3.0), ("stock", 2.0))
    }
    monkeypatch.setattr(start_cost, "seconds", lambda program, args: asked.append(program) or taken[program].pop(0))
    figures = start_cost.compare(args)
    assert asked == ["stock", "ours", "ours", "stock"]
    assert set(figures) == {"ours", "stock", "ours / stock"}
    assert (figures["ours / stock"]["n"], figures["ours / stock"]["ratio"]) == (1, 1.5)


def test_the_record_of_the_start_is_what_the_readme_says():
    record = json.loads((ROOT / "benchmarks" / "records" / "start_cost.json").read_text())
    figures, words = record["figures"], (ROOT / "docs" / "benchmarks.md").read_text()
    assert record["parameter_bytes"] == pytest.approx(1e8, rel=0.1)
    for program in ("ours", "before"):
        found = figures[f"{program} / stock"]
        assert found["n"] >= 7
        assert f"{found['ratio']:.2f} ({found['p10']:.2f} to {found['p90']:.2f})" in words
    found = figures["ours / stock"]
    assert found["met"] == (found["ratio"] <= start_cost.AT_MOST)
    assert f"≤ {start_cost.AT_MOST} | {'met' if found['met'] else '**missed**'} |" in words


# ---- node workers ----


def rank_of_a_turn(seconds, **figures):
    """What a process prints, of a model of 4 MiB."""
    own = {
        "payload": [8, 8, 8],
        "between": [9, 9, 10],
        "inside": [0, 0, 0],
        "slow_state": 16,
        "weights": "a",
    } | figures
    return {"4": {"seconds": seconds, "report_seconds": seconds, **own}}


def two_turns(**figures):
    """Of two ranks. The slowest process's rounds: before 2, 4, 3, then 2, 2, 2; after half of these."""
    before = [[2.0, 4.0, 1.0], [1.0, 1.0, 3.0]], [[2.0, 2.0, 2.0], [1.0, 1.0, 1.0]]
    return {
        side: [[rank_of_a_turn([part * value for value in rank], **own) for rank in one] for one in before]
        for side, part, own in (("before", 1.0, {}), ("after", 0.5, figures))
    }


def test_a_round_of_columns_is_that_of_its_slowest_process():
    """Turns' medians are 3 and 2 before, 1.5 and 1 after: 2.5 and 1.25."""
    figures = columns.of_model(two_turns(), 4)
    assert figures["before"]["seconds"] == {"n": 6, "median": 2.0, "min": 2.0, "max": 4.0}
    assert figures["after"]["seconds"] == {"n": 6, "median": 1.0, "min": 1.0, "max": 2.0}
    assert figures["after / before"] == {
        "n": 2, "ratio": 0.5, "p10": 0.5, "p90": 0.5, "target": "<= 0.55", "met": True
    }  # fmt: skip
    assert figures["before"]["between_bytes"] == [9, 9]
    assert figures["before"]["slow_state_bytes"] == [16, 16]
    assert figures["same_weights"]


def test_the_table_of_columns_says_what_is_wrong():
    turns = two_turns(slow_state=2_000_000, weights="b")
    turns["before"] = turns["after"]
    rows = columns.table({4: columns.of_model(turns, 4)}).splitlines()
    assert len(rows) == 3
    assert rows[1].split()[:6] == ["4", "before", "1.000", "(1.000", "to", "2.000)"]
    assert rows[1].split()[6:] == ["1.000", "0.00", "0.00", "0.00", "2.00"]
    assert rows[2].endswith("1.000 (1.000 to 1.000), over 0.55")
    turns["before"] = two_turns()["before"]
    assert columns.table({4: columns.of_model(turns, 4)}).endswith("0.500 (0.500 to 0.500); WEIGHTS DIFFER")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"before": "nowhere"}, "before must be a folder that holds slowmo_hf, got 'nowhere'."),
        ({"turns": 0}, "turns must be >= 1, got 0."),
        ({"mebibytes": [4, 0]}, "mebibytes must be >= 1 for every model"),
    ],
)
def test_columns_refuses(wrong, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        columns.ColumnArguments(**wrong)


@pytest.mark.slow
@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_columns_compares_two_checkouts():
    """
    Of this one with itself, tiny. Between the workers a round sends one payload each way in all, whoever sends it, and
    holds two fp32 copies per worker.
    """
    args = columns.ColumnArguments(mbit_per_s=100.0, mebibytes=[1], turns=1, rounds=1)
    turns = columns.compare(args, {"before": ROOT / "src", "after": ROOT / "src"})
    figures = columns.of_model(turns, 1)
    assert figures["same_weights"]
    for side in columns.SIDES:
        for first in (0, 2):
            both = slice(first, first + 2)
            assert 2**20 < sum(figures[side]["payload_bytes"][both]) < 2**20 + 4096
            assert 2**20 < sum(figures[side]["between_bytes"][both]) < 1.07 * 2**20 + 50_000
            assert sum(figures[side]["slow_state_bytes"][both]) == 2 * 2**20
        assert min(figures[side]["inside_bytes"][::2]) > 2**19, "what a leader has averaged, it hands to its mate"
