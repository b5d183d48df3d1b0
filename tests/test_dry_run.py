"""
The dry run of WMT'16: its arithmetic in numbers worked out by hand, the program at a tiny size, and its record beside
the page that shows it.
"""

from __future__ import annotations

import json
import platform
import re
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from launcher import run_really
from slowmo_hf import SlowMoConfig
from studies import dry_run
from studies.dry_run_tables import _step, step_name, tables
from studies.made_up_pairs import write_pairs
from studies.paper_arithmetic import Checkpoints, all_rows, ring_bytes, row
from translation import train as recipe
from translation.data import load_corpus
from translation.tokens import TokenBatches, encode_corpus, make_batches, token_counts

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"

RECORD = json.loads((RECIPES / "records/translation/dry_run.json").read_text())
SIZE = "--pairs 2000 --vocab_size 400 --model_size mini --max_tokens 256 --max_length 128"


# ---- arithmetic ----

# By hand, with 1,000 parameters and 120 updates an epoch, so 3,000 in 25 epochs, 8 nodes, and 2 checkpoints kept: 3
# while one is saved. A ring sends 2 x 7/8 x 4,000 = 7,000 bytes, gossip 4,000 at every update that is no round.
BY_HAND = [
    # base, momentum, rounds, bytes of a node, hours x 3,600, shared, per worker
    ("local_sgd", 0.0, 250, 250 * 7000, 3000 * 0.503, 16_000, 12_000),
    ("local_sgd", 0.5, 250, 250 * 7000, 3000 * 0.505, 20_000, 12_000),
    ("sgp", 0.0, 0, 3000 * 4000, 3000 * 1.225, 12_000, 20_000),
    ("sgp", 0.5, 62, 62 * 7000 + 2938 * 4000, 3000 * 1.279, 20_000, 16_000),
    ("all_reduce", 0.0, 0, 3000 * 7000, 3000 * 1.648, 12_000, 0),
]


@pytest.mark.parametrize(("base", "momentum", "rounds", "sent", "seconds", "shared", "worker"), BY_HAND)
def test_a_row_by_hand(base, momentum, rounds, sent, seconds, shared, worker):
    found = row(base, momentum, parameters=1000, updates_per_epoch=120, kept=2)
    assert found["updates"] == 3000
    assert found["rounds"] == rounds
    assert found["bytes_per_node"] == sent
    assert 3600 * found["hours"] == pytest.approx(seconds)
    assert found["disk_bytes_shared_by_all"] == 3 * (shared + 8 * worker)
    assert found["disk_bytes_of_each_machine"] == 3 * (shared + worker)


def test_the_rows_are_the_papers():
    rows = all_rows(1000, 120, 5)
    assert [(found["base"], found["outer_momentum"]) for found in rows] == [case[:2] for case in BY_HAND]
    assert [found["sync_every"] for found in rows] == [12, 12, None, 48, None]


def test_a_ring_by_hand():
    """Of two machines each sends the payload once, of eight 7/4 of it."""
    assert (ring_bytes(800, 2), ring_bytes(800, 8)) == (800, 1400)


# ---- made-up pairs ----


def test_made_up_pairs(tmp_path):
    """As many as asked in three files of WMT's format, hardly two alike, an empty line in each file."""
    write_pairs(tmp_path, 30_000)
    corpus = load_corpus(str(tmp_path))
    assert (len(corpus.train), corpus.empty_train_rows) == (29_997, 3)
    assert (len(corpus.validation), len(corpus.test)) == (3000, 3000)
    files = sorted(tmp_path.glob("train*"))
    assert [pq.read_metadata(file).num_rows for file in files] == [10_000] * 3
    assert [field.name for field in pq.read_schema(files[0]).field("translation").type] == ["de", "en"]
    assert len(set(corpus.train["source"][:])) > 29_000, "short ones may meet"
    words = [sentence.split() for sentence in corpus.train["target"][:]]
    assert np.mean([len(sentence) for sentence in words]) == pytest.approx(18, rel=0.05)
    assert len({word for sentence in words for word in sentence}) > 100_000


# ---- the program ----


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Its folder and record."""
    folder = tmp_path_factory.mktemp("dry_run")
    flags = f"{SIZE} --folder {folder} --record {folder}/record.json"
    said = run_really(["recipes/studies/dry_run.py", *flags.split()], launcher="")
    record = json.loads((folder / "record.json").read_text())
    assert tables(record) in said
    return folder, record


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_program_at_a_tiny_size(tiny, monkeypatch):
    """Its figures are those of the recipe's own functions on the same pairs."""
    folder, record = tiny
    found = record["preprocessing"]
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "another")
    corpus = load_corpus(str(folder / "pairs"))
    (tokenizer,) = (path for path in (folder / "tokenizers").glob(f"*pairs-en-de-2000-{corpus.train_sha256[:12]}-400"))
    sets = encode_corpus(corpus, PreTrainedTokenizerFast.from_pretrained(tokenizer), 128)
    lengths = token_counts(sets.train)
    batches = make_batches(lengths, 256)
    held = sum(len(batch) * lengths[batch].max(axis=0) for batch in batches)
    assert (found["pairs"], found["text_pairs"], found["batched_pairs"]) == (2000, 2000, len(lengths))
    assert found["longer_pairs"] == 2000 - len(lengths) > 0
    assert found["vocabulary"] == 400
    assert (found["batches"], found["updates_per_epoch"]) == (len(batches), -(-len(batches) // 64))
    assert found["padding"] == pytest.approx(1 - lengths.sum() / held.sum())
    assert found["padding"] == TokenBatches(lengths, 256, world_size=64).padding()
    assert found["tokens_per_update"]["target"] == pytest.approx(64 * lengths[:, 1].sum() / len(batches))
    assert found["second_process"]["bytes_written"] == 0, "nothing is made again"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_tiny_step_sends_and_saves_what_theory_says(tiny):
    """
    A round of two workers sends every parameter once, and with each bucket 4 bytes; a status exchange has some
    hundred. At a round's end a worker's weights are the anchors.
    """
    _, record = tiny
    check_step(record["steps"]["2 processes"]["ranks"])
    for part in (record["preprocessing"], *record["steps"].values(), record["arithmetic"]):
        assert part["command"].startswith("python recipes/studies/dry_run.py --pairs 2000 ")
        assert part["hardware"].endswith(platform.machine())


def check_resume(resume: dict) -> None:
    assert [rank["rank"] for rank in resume["ranks"]] == [0, 31, 63]
    for rank in resume["ranks"]:
        assert rank["same_order"]
        assert 0 < rank["skipped"] == rank["batches"] // 2
    assert resume["same_tensors"]
    assert resume["loaded_batches"] > 0


def check_step(ranks: list[dict]) -> None:
    assert len(ranks) == 2
    assert ranks[0]["loss"] == pytest.approx(ranks[1]["loss"]), "Trainer's mean over both"
    for rank in ranks:
        assert 0 < rank["bytes_sent"] - ring_bytes(4 * rank["parameters"], 2) < 2000
    files = {name.partition("/")[2]: size for name, size in ranks[0]["checkpoint_bytes"].items()}
    parameters = ranks[0]["parameters"]
    expected = Checkpoints.of(parameters, SlowMoConfig.paper("wmt16", outer_momentum=0.5))
    shared = sum(files[name] for name in ("model.safetensors", "optimizer.pt", "slowmo/shared.safetensors"))
    assert shared == pytest.approx(expected.shared, rel=0.02)
    for number in range(2):
        own = files[f"slowmo/worker_{number}.pt"] + files[f"slowmo/worker_{number}.safetensors"]
        assert own + 4 * parameters == pytest.approx(expected.per_worker, rel=0.04)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_tiny_resume_is_exact(tiny):
    check_resume(tiny[1]["preprocessing"]["resume"])


def test_a_step_may_be_of_more_micro_batches(tmp_path, monkeypatch):
    """Flags behind the command reach the recipe; the preset's own accumulation is 1."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    for flags, expected in (([], 1), (["--gradient_accumulation_steps", "16"], 16)):
        assert dry_run.settings(tmp_path, flags)[2].gradient_accumulation_steps == expected
    rank = RECORD["steps"]["2 processes"]["ranks"][0]
    taken = [{**rank, "micro_batches": 16}] * 2
    assert step_name(taken) == "2 processes, 16 micro-batches", "beside the preset's, in the record and on the page"
    (told,) = (line for line in _step(taken).items() if "forward" in line[0])
    assert told[0] == "`big`, 2 processes, 16 micro-batches: forward and backward"
    assert told[1].startswith(f"16 micro-batches of {rank['max_tokens']:,} positions, ")


# ---- the record and the page ----


def test_record_is_of_the_papers_size():
    """4.5 million pairs in batches of the preset, resumed exactly; no path is told."""
    script, _, args = recipe.parse(["--preset", "wmt16"])
    found = RECORD["preprocessing"]
    assert found["pairs"] == 4_500_000
    assert found["batched_pairs"] == pytest.approx(4_500_000, rel=0.001)
    assert (found["max_tokens"], found["max_length"]) == (script.max_tokens, script.max_length)
    assert found["micro_batches"] == args.gradient_accumulation_steps
    assert found["vocabulary"] == script.vocab_size
    assert 25 < found["mean_tokens"]["source"] < 33
    assert found["batches_per_process_and_epoch"] == -(-found["batches"] // 64)
    assert found["second_process"]["bytes_written"] == 0
    check_resume(found["resume"])
    assert {rank["batches"] for rank in found["resume"]["ranks"]} == {found["batches_per_process_and_epoch"]}
    assert RECORD["arithmetic"]["parameters"] == 209_125_376, "of big"
    assert not re.search(r'["= ]/\w', json.dumps(RECORD))


@pytest.mark.parametrize("micro_batches", [1, 16])
def test_record_s_step_is_a_round_of_two(micro_batches):
    """At the preset's size; bytes and files as worked out from the parameters."""
    taken = [step["ranks"] for step in RECORD["steps"].values()]
    (ranks,) = (ranks for ranks in taken if ranks[0]["micro_batches"] == micro_batches)
    names = ("model_size", "base", "sync_every", "max_tokens", "parameters")
    assert {tuple(rank[name] for name in names) for rank in ranks} == {("big", "local_sgd", 1, 3584, 209_125_376)}
    check_step(ranks)


def test_record_says_where_each_part_comes_from():
    parts = (RECORD["preprocessing"], *RECORD["steps"].values(), RECORD["arithmetic"])
    for part in parts:
        assert part["command"].startswith("python recipes/studies/dry_run.py --")
        assert re.fullmatch("[0-9a-f]{40}", part["commit"])
        assert part["versions"]["slowmo_hf"]


def test_record_s_arithmetic_is_the_program_s():
    known = RECORD["arithmetic"]
    assert known["is"] == "arithmetic, not measured"
    assert known["updates_per_epoch"] == RECORD["preprocessing"]["updates_per_epoch"]
    assert known["rows"] == all_rows(known["parameters"], known["updates_per_epoch"], known["checkpoints_kept"])


def test_page_has_the_figures():
    """Every line of both tables, and the figures of the text around them."""
    page = (ROOT / "docs/launch.md").read_text()
    section = page.partition("## The paper's sizes")[2]
    for line in tables(RECORD).splitlines():
        assert line in section, line
    section = " ".join(section.replace("\n> ", " ").split())
    found, worked_out = RECORD["preprocessing"], RECORD["arithmetic"]
    accumulated = RECORD["steps"]["2 processes, 16 micro-batches"]["ranks"][0]
    assert found["text_pairs"] == found["pairs"] - found["empty_pairs"]  # all of them
    assert f"encoding took {found['stages']['encode']['seconds'] / 60:.0f} minutes" in section
    assert f"has the preset's {found['max_tokens']:,} positions on each of two processes" in section
    counts = {name: recipe.parse(["--preset", name])[2].gradient_accumulation_steps for name in ("wmt16", "ott")}
    assert RECORD["steps"]["2 processes"]["ranks"][0]["micro_batches"] == counts["wmt16"] == 1
    assert f"`ott`, for 8 processes, accumulates {counts['ott']}: the rows of {counts['ott']} micro-batch" in section
    assert (accumulated["micro_batches"], accumulated["max_tokens"]) == (counts["ott"], found["max_tokens"])
    assert worked_out["checkpoints_kept"] == 6, "and room for seven"
    assert f"{worked_out['updates_per_epoch']:,} an epoch" in section
    assert f"{worked_out['parameters']:,} fp32 parameters" in section
    per_gpu = worked_out["target_tokens_per_update"] / worked_out["processes"] / 0.505
    assert f"{per_gpu:,.0f} target tokens a second and GPU" in section
