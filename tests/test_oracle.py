"""
What the translation recipe has in common with fairseq, in numbers that were worked out by hand or are fairseq's: no
package of it is needed. The record of the comparison itself is read, and the page that shows it.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import get_scheduler

from studies import oracle, oracle_model
from translation import model as transformer
from translation import train as recipe
from translation.tokens import EOS, NO_LABEL, PAD

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"

RECORD = json.loads((RECIPES / "records/translation/oracle.json").read_text())
PIECES = {row["piece"]: row for row in RECORD["rows"]}


def test_preset_is_the_published_command_line():
    """The flags that fairseq's part of the comparison runs with are those of the preset."""
    source = ast.parse((RECIPES / "studies/oracle_fairseq.py").read_text())
    (flags,) = (
        ast.literal_eval(node.value)
        for node in source.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PUBLISHED"
    )
    words = flags.split()
    told = {name: value for name, value in pairwise(words) if name.startswith("--")}
    script, _, args = recipe.parse(["--preset", "wmt16"])
    assert float(told["--lr"]) == args.learning_rate
    assert float(told["--warmup-updates"]) == args.warmup_steps
    assert float(told["--label-smoothing"]) == args.label_smoothing_factor
    assert float(told["--clip-norm"]) == args.max_grad_norm
    assert float(told["--weight-decay"]) == args.weight_decay
    assert ast.literal_eval(told["--adam-betas"]) == (args.adam_beta1, args.adam_beta2)
    assert int(told["--max-tokens"]) == script.max_tokens
    assert args.adam_epsilon == 1e-8


def test_learning_rates_of_the_paper_s_schedule():
    """
    An update's rate follows from the updates before it: 5e-4 (n - 1) / 4000, then 5e-4 sqrt(4000 / (n - 1)). fairseq
    starts at 1e-7 in place of 0, and is never further away than that.
    """
    _, _, args = recipe.parse(["--preset", "wmt16"])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, num_warmup_steps=args.get_warmup_steps(300_000))
    factor = scheduler.lr_lambdas[0]
    theirs = {1: 1e-7, 100: 1.2472525e-5, 4000: 4.99875025e-4, 16_000: 2.5000781e-4}
    ours = {1: 0.0, 100: 1.2375e-5, 4000: 4.99875e-4, 16_000: 5e-4 * math.sqrt(4000 / 15_999)}
    for update in theirs:
        rate = args.learning_rate * factor(update - 1)
        assert rate == pytest.approx(ours[update], rel=1e-9)
        assert rate == pytest.approx(theirs[update], rel=1e-6, abs=1.0001e-7)
        assert PIECES[f"learning rate of update {update:,}"]["theirs"] == pytest.approx(theirs[update], rel=1e-6)


@pytest.mark.parametrize(("smoothing", "bits"), [(0.0, 1.0), (0.1, 1.125), (0.1 * 4 / 3, 0.9 + 0.8 / 3)])
def test_smoothed_loss_written_out(smoothing, bits):
    """
    Probabilities 1/2, 1/4, 1/8, 1/8 cost 1, 2, 3 and 3 bits; the label is the first. Smoothed by 0.1 over all four, as
    fairseq did in 2019: 0.9 x 1 + 0.1 x 9/4 = 1.125. fairseq 0.12.2 spreads 0.1 over the three others, 0.9 x 1 + 0.1 x
    8/3, which is ours with 4/3 of 0.1. A missing label counts nowhere.
    """
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log().expand(1, 2, 4)
    loss = transformer.smoothed_loss(
        SimpleNamespace(logits=logits), torch.tensor([[0, NO_LABEL]]), label_smoothing=smoothing
    )
    assert loss.item() / math.log(2) == pytest.approx(bits, rel=1e-6)


def deviations(size: str) -> dict[str, float]:
    """Standard deviation by kind of matrix, of all layers together; the row of padding is zero."""
    torch.manual_seed(0)
    kinds: dict[str, list[torch.Tensor]] = {}
    for name, value in transformer.make_transformer(size, 4000).named_parameters():
        kind, _, end = name.rpartition(".")
        if value.requires_grad and end == "weight" and value.ndim == 2:
            assert kind != "model.shared" or not value[PAD].any()
            kinds.setdefault(kind.rpartition(".")[2], []).append(value.detach()[kind == "model.shared" :].flatten())
        elif value.requires_grad:
            assert (value == (0.0 if end == "bias" else 1.0)).all(), name
    return {kind: torch.cat(values).std().item() for kind, values in kinds.items()}


def test_published_sizes_start_as_fairseq_s():
    """
    d = 512 wide, f = 2,048 inside. Glorot: variance 2 / (inputs + outputs), so 1/d for attention's output and 2/(d +
    f) for both feed-forward matrices; queries, keys and values are one matrix of 3 d outputs, 2/(4 d); embeddings 1/d.
    """
    d, f = 512, 2048
    third = math.sqrt(1 / (2 * d))
    expected = {"shared": d**-0.5, "q_proj": third, "k_proj": third, "v_proj": third, "out_proj": d**-0.5}
    expected |= {"fc1": math.sqrt(2 / (d + f)), "fc2": math.sqrt(2 / (d + f))}
    assert deviations("base") == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("year", [None, 2020])
def test_small_starts_as_fairseq_s_of_2021(year):
    """
    d = 128, f = 256. Attention as above. Feed-forward layers as torch draws a layer of n inputs, between -1/√n and
    1/√n: variance 1/(3 n), of biases too, also those of queries, keys and values; other biases are 0. In 2020, with
    which the published figure was made, feed-forward layers are Glorot's.
    """
    torch.manual_seed(0)
    d, f = 128, 256
    expected = {"q_proj": (2 * d) ** -0.5, "k_proj": (2 * d) ** -0.5, "v_proj": (2 * d) ** -0.5, "out_proj": d**-0.5}
    inputs = {"q_proj": d, "k_proj": d, "v_proj": d}
    if year is None:
        expected |= {"fc1": (3 * d) ** -0.5, "fc2": (3 * f) ** -0.5}
        inputs |= {"fc1": d, "fc2": f}
    else:
        expected |= dict.fromkeys(("fc1", "fc2"), math.sqrt(2 / (d + f)))
    layers: dict[str, list[torch.nn.Linear]] = {}
    for name, module in transformer.make_transformer("small", 4000, year=year).model.named_modules():
        if isinstance(module, torch.nn.Linear):
            layers.setdefault(name.rpartition(".")[2], []).append(module)
    assert layers.keys() == expected.keys()
    for kind, modules in layers.items():
        weights, biases = (torch.stack([getattr(module, of) for module in modules]) for of in ("weight", "bias"))
        assert weights.std().item() == pytest.approx(expected[kind], rel=0.02), kind
        if kind not in inputs:
            assert not biases.any()
        else:
            assert biases.std().item() == pytest.approx((3 * inputs[kind]) ** -0.5, rel=0.06), kind
            assert biases.abs().max() <= inputs[kind] ** -0.5


def test_sizes_of_the_recipe_start_as_marian_s():
    """The records of the studies were made with variance 1/d everywhere."""
    sizes = deviations("mini")
    assert len(sizes) == 7
    assert all(value == pytest.approx(64**-0.5, rel=0.03) for value in sizes.values())


@pytest.mark.parametrize(("size", "d", "f"), [("big", 1024, 4096), ("base", 512, 2048)])
def test_record_has_the_deviations_of_both_sizes(size, d, f):
    """
    Drawn at the real size. fairseq 0.12.2 draws feed-forward layers as torch does, between -1/√n and 1/√n of n inputs.
    """
    glorot = math.sqrt(2 / (d + f))
    for words, ours, theirs in (
        ("embeddings", d**-0.5, d**-0.5),
        ("queries", (2 * d) ** -0.5, (2 * d) ** -0.5),
        ("keys", (2 * d) ** -0.5, (2 * d) ** -0.5),
        ("values", (2 * d) ** -0.5, (2 * d) ** -0.5),
        ("attention's output", d**-0.5, d**-0.5),
        ("first of the feed-forward layer", glorot, (3 * d) ** -0.5),
        ("second of the feed-forward layer", glorot, (3 * f) ** -0.5),
    ):
        row = PIECES[f"{size}: initial sd of {words}"]
        assert row["ours"] == pytest.approx(ours, rel=0.02), words
        assert row["theirs"] == pytest.approx(theirs, rel=0.02), words
        assert row["different"] == (ours != theirs), words


def test_record_says_which_biases_start_at_0(monkeypatch):
    """
    As the program prints it: fairseq 0.9.0 leaves queries, keys and values with torch's biases (modules/
    multihead_attention.py, reset_parameters), 0.8.0 had one `in_proj_bias` of 0.
    """
    for size in ("big", "base"):
        tiny = {**transformer.MODEL_SIZES[size], "d_model": 64, "ffn": 128}
        monkeypatch.setitem(transformer.MODEL_SIZES, size, tiny)
    drawn = defaultdict(lambda: [0.25], {"out_proj.bias": [0.0]})
    fairseq = SimpleNamespace(numbers={"initial": {"big": drawn, "base": drawn}})
    rows = {row["piece"]: row for row in oracle_model.initial(fairseq) if "biases" in row["piece"]}
    assert rows.keys() == {piece for piece in PIECES if "biases" in piece}
    verdicts = {
        "queries, keys and values": "different: 0, as in fairseq 0.8.0; in 0.9.0 and there torch's own",
        "the feed-forward layer": "different: 0, as in fairseq 0.9.0; there torch's own",
    }
    for piece, row in rows.items():
        verdict = verdicts[piece.partition(": initial biases of ")[2]]
        assert row["verdict"] == f"{verdict}, sd 0.2500", piece
        assert PIECES[piece]["verdict"].startswith(f"{verdict}, sd 0.0"), piece
    assert len(rows) == 4


def test_scores_of_beams_by_hand():
    """
    A model whose next token is </s> with 0.5, a with 0.3, b with 0.2, whatever came before. None is empty, so a comes
    first: ln 0.15 / 2^0.6, before b, ln 0.1 / 2^0.6, and a a, ln 0.045 / 3^0.6.
    """
    a, b = 5, 9
    model = transformer.make_transformer("mini", 16).eval()
    for parameter in model.parameters():
        parameter.data.zero_()
    chances = torch.full((16,), 1e-30)
    chances[EOS], chances[a], chances[b] = 0.5, 0.3, 0.2
    model.final_logits_bias.copy_(chances.log())
    source = torch.tensor([[3, 4, EOS]])
    made = model.generate(
        input_ids=source, num_return_sequences=3, return_dict_in_generate=True, output_scores=True
    )  # of its own generation config, as anybody would
    found = [tokens[1 : tokens.index(EOS) + 1] for tokens in made.sequences.tolist()]
    assert found == [[a, EOS], [b, EOS], [a, a, EOS]]
    expected = [math.log(0.15) / 2**0.6, math.log(0.1) / 2**0.6, math.log(0.045) / 3**0.6]
    assert made.sequences_scores.tolist() == pytest.approx(expected, rel=1e-5)
    assert transformer.generate(model, source, torch.ones_like(source))[0].tolist() == [PAD, a, EOS]
    greedy = transformer.generate(model, source, torch.ones_like(source), num_beams=1)
    assert greedy[0].tolist() == [PAD, a, EOS], "not the empty one, though </s> is likelier"


def test_checkpoints_are_summed_in_float64(tmp_path):
    """2^24 + 1 + 1 over 3 is 5,592,406; a sum in float32 loses both ones."""
    for number, value in enumerate((2.0**24, 1.0, 1.0)):
        model = transformer.make_transformer("mini", 16)
        model.model.shared.weight.data.fill_(value)
        model.save_pretrained(tmp_path / str(number))
    mean = transformer.average_checkpoints([tmp_path / str(number) for number in range(3)])
    assert (mean["model.shared.weight"].float() == 5_592_406.0).all()


# ---- the record ----


def test_record_is_whole():
    """Every piece has a verdict, no figure came from another version, and no path is told."""
    assert RECORD["theirs"]["fairseq"] == "0.12.2"
    assert RECORD["versions"].keys() >= {"torch", "transformers", "accelerate", "slowmo_hf"}
    assert len(PIECES) == len(RECORD["rows"])
    for piece, row in PIECES.items():
        assert row["verdict"].startswith(("equal", "different: ")), piece
        assert row["different"] == row["verdict"].startswith("different"), piece
        assert row["digits"] is None or f"equal to {row['digits']} digits" in row["verdict"], piece
    assert not re.search(r'["= ]/\w', json.dumps(RECORD))


def test_record_says_that_the_model_is_fairseq_s():
    """What must be equal for a figure to be comparable, in the digits that float64 and a loss in float32 leave."""
    for size in ("big", "base"):
        assert PIECES[f"{size}: logits"]["digits"] >= 13
        for piece in ("NLL per target token, in bits", "label-smoothed loss per target token"):
            assert PIECES[f"{size}: {piece}"]["digits"] >= 6
        assert PIECES[f"{size}: gradient of every parameter"]["digits"] >= 5
    assert PIECES["20 updates by each Trainer: change of every parameter"]["digits"] >= 5
    assert PIECES["Adam: 20 updates, given gradients"]["digits"] >= 12
    (translations,) = (row for piece, row in PIECES.items() if "translations, beam 4" in piece)
    assert not translations["different"]
    assert translations["digits"] >= 5
    assert PIECES["mean of 5 checkpoints"]["digits"] >= 6
    assert PIECES["clipping: off, at --clip-norm 0.0 and max_grad_norm 0"]["digits"] >= 12
    assert {f"learning rate of update {update}" for update in ("1", "100", "4,000", "16,000")} <= PIECES.keys()
    assert any(piece.startswith("tokens per update") for piece in PIECES)
    kinds = ("embeddings", "queries", "keys", "values", "attention's output")
    for piece in (f"{size}: initial sd of {kind}" for size in ("big", "base") for kind in kinds):
        assert PIECES[piece]["ours"] == pytest.approx(PIECES[piece]["theirs"], rel=0.02), piece


def test_results_page_has_the_table():
    page = (ROOT / "docs/results.md").read_text()
    assert oracle.table(RECORD) in page
    far = PIECES["Adam: 20 updates, given gradients"]["further"]
    small = f"{far['at 1e-5']:.1%} at 1e-5 and {far['at 1e-7']:.0%} at 1e-7"
    assert f"{far['at 1e-3']:.2%} where gradients are 1e-3, {small}" in page
    held = next(row for piece, row in PIECES.items() if piece.startswith("tokens per update"))
    assert f"{held['ours']['target']:,.0f} target tokens" in page
