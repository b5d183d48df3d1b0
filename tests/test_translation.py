"""The translation recipe: run as a user runs it, on shipped text, and its parts against stated values."""

import dataclasses
import hashlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import datasets
import evaluate
import numpy as np
import pytest
import sacrebleu
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sacremoses import MosesTokenizer
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, MarianMTModel

import records
from harness import run_workers
from launcher import RECIPE_ENVIRONMENT, run_really, run_script
from records import DataError
from slowmo_hf import SlowMoConfig
from tiny import ends_with_one_line
from translation import model as transformer
from translation import tokens
from translation import train as recipe
from translation.bleu import CompoundSplitBleu, SacreBleu, bleu, compound_split_bleu, split_compounds
from translation.data import NEWSTESTS, PROTOCOL_ROWS, load_corpus
from translation.judged import all_scores, choose, judge, named
from translation.trainer import RunModels, checkpoints_of_others

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"

RECORD_KEYS = {
    *(
        "study",
        "task",
        "preset",
        "dataset",
        "languages",
        "train_rows",
        "validation_set",
        "validation_rows",
        "test_set",
        "test_rows",
    ),
    *(
        "model_size",
        "vocab_size",
        "max_tokens",
        "tokens_per_update",
        "num_beams",
        "length_penalty",
        "averaged_checkpoints",
        "metrics",
        "bleu_signature",
    ),
    *(
        "curve",
        "curve_num_beams",
        "model",
        "base",
        "slowmo",
        "exact_average",
        "workers",
        "processes",
        "sync_every",
        "outer_lr",
    ),
    *(
        "outer_momentum",
        "inner_optimizer",
        "inner_lr",
        "inner_state",
        "seed",
        "steps",
        "rounds",
        "bytes_sent_per_worker",
        "seconds",
    ),
    *("seconds_communicating", "command", "versions", "commit", "hardware"),
    *("corpus_sha256", "tokenizer_sha256", "steps_of_models", "seconds_scoring"),
}


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def corpus():
    return load_corpus(max_train_samples=2000, max_eval_samples=60)


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return tokens.train_tokenizer(tokens.sentences_of(corpus.train), 1000)


def pairs(count: int) -> list[dict[str, str]]:
    """Short sentences of the shipped training text, all different."""
    rows = load_corpus(max_train_samples=600).train
    return [row for row in rows if 5 <= len(row["source"].split()) <= 9][:count]


def write_text(folder: Path, sets: dict[str, list[dict[str, str]]]) -> str:
    """`<split>.en` and `<split>.de`, a line per sentence."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in sets.items():
        for end, side in (("en", "source"), ("de", "target")):
            (folder / f"{split}.{end}").write_text("".join(f"{row[side]}\n" for row in rows), encoding="utf-8")
    return str(folder)


# ---- the job, as a user starts it ----


def run_recipe(output_dir: Path, flags: str, *, really: bool = False):
    """What the program said, and its record; two processes, by `accelerate launch` where `really`."""
    command = ["recipes/translation/train.py", "--output_dir", str(output_dir), *flags.split()]
    said = run_really(command) if really else run_script(command, 2, output_dir)
    return said, json.loads((output_dir / "record.json").read_text())


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """
    Forty pairs by heart: two workers, a batch per epoch and process, checkpoints at steps 20, 40 to 100; the last two
    averaged.
    """
    folder = tmp_path_factory.mktemp("learned")
    rows = pairs(40)
    data = write_text(folder / "data", {"train": rows, "validation": rows, "test": rows})
    said, record = run_recipe(
        folder / "out",
        f"--dataset_name {data} --vocab_size 600 --max_tokens 512 --max_steps 100 --sync_every 5 --learning_rate 3e-3 "
        "--warmup_steps 30 --dropout 0 --eval_strategy steps --eval_steps 50 --save_strategy steps --save_steps 20 "
        "--average_checkpoints 2 --per_device_eval_batch_size 16 --logging_steps 10 --plot "
        "--disable_tqdm 1",
    )
    return folder / "out", data, said, record


@pytest.mark.slow
def test_record_is_complete_and_right(learned):
    folder, data, said, record = learned
    assert set(record) == RECORD_KEYS
    assert (record["study"], record["task"], record["dataset"], record["languages"]) == (
        "single",
        "translation",
        data,
        "en-de",
    )
    assert (record["train_rows"], record["validation_rows"], record["test_set"], record["test_rows"]) == (
        40,
        40,
        "test",
        40,
    )
    assert (record["workers"], record["base"], record["slowmo"], record["inner_optimizer"]) == (
        2,
        "local_sgd",
        True,
        "AdamW",
    )
    assert (record["steps"], record["rounds"], record["averaged_checkpoints"]) == (100, 20, 2)
    lengths = tokens.token_counts(tokens.encode(load_corpus(data).train, AutoTokenizer.from_pretrained(folder)))
    held = record["tokens_per_update"]
    assert held["target"] == pytest.approx(2 / len(tokens.make_batches(lengths, 512)) * lengths[:, 1].sum())
    assert held["target"] < held["target_padded"] <= 2 * 512
    logged = re.search(r"'tokens_per_update': '?([\d.]+)'?, 'tokens_per_update_padded': '?([\d.]+)", said)
    assert [float(figure) for figure in logged.groups()] == pytest.approx(
        [held["target"], held["target_padded"]], rel=1e-3
    )
    logged = re.search(r"'loss': '?([\d.]+)'?.*'loss_bits': '?([\d.]+)", said)
    nats, bits = (float(figure) for figure in logged.groups())
    assert bits == pytest.approx(nats / math.log(2), rel=1e-3)
    assert f"target tokens per update{held['target']:,.0f}, {held['target_padded']:,.0f} with padding" in said
    assert record["bleu_signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert [point["step"] for point in record["curve"]] == [50, 100]
    assert 0 < record["seconds_communicating"] < record["seconds"]


@pytest.mark.slow
def test_it_learns(learned):
    """A wrong shift of labels, mask or start token would leave BLEU near 0; the same pairs are validation and test."""
    _, _, _, record = learned
    metrics = record["metrics"]
    assert metrics["test_bleu"] > 50
    assert record["curve"][0]["validation_nll"] > record["curve"][1]["validation_nll"]
    assert metrics["validation_bleu"] == metrics["test_bleu"]
    assert metrics["validation_nll"] == pytest.approx(metrics["test_nll"], rel=1e-6)
    for nats in [name for name in metrics if "nll" in name and "bits" not in name]:
        nats, _, kind = nats.partition("nll")
        nats, bits = f"{nats}nll{kind}", f"{nats}nll_bits{kind}"
        assert metrics[bits] == pytest.approx(metrics[nats] / math.log(2))
    for nats in ("validation_nll", "test_nll"):
        assert metrics[f"{nats}_bits"] == pytest.approx(metrics[nats] / math.log(2))
    assert [look["validation_nll_bits"] for look in record["curve"]] == pytest.approx(
        [look["validation_nll"] / math.log(2) for look in record["curve"]]
    )


@pytest.mark.slow
def test_record_counts_every_round_s_bytes(learned):
    """
    Two workers in a ring send their payload once: fp32 parameters that are trained, without positions, and at most 1
    KiB per round.
    """
    _, _, _, record = learned
    model = transformer.make_transformer("tiny", record["vocab_size"])
    payload = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert record["rounds"] * payload <= record["bytes_sent_per_worker"] <= record["rounds"] * (payload + 1024)


@pytest.mark.slow
def test_bleu_is_the_command_line_s(learned):
    """On the files that the recipe leaves; these are in the test set's order."""
    folder, data, said, record = learned
    for end in ("en", "de"):
        assert (folder / f"test.{end}").read_text() == (Path(data) / f"test.{end}").read_text()
    score, signature = sacrebleu_command(folder / "test.de", folder / "test.hyp.de")
    assert record["metrics"]["test_bleu"] == pytest.approx(score, abs=1e-9)
    assert record["bleu_signature"] == signature
    assert f"BLEU of the average     {score:.2f} (test, 40 rows)" in said
    assert f"signature               {signature}" in said


@pytest.mark.slow
def test_saved_model_and_tokenizer_give_the_recorded_bleu(learned):
    folder, data, _, record = learned
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert isinstance(model, MarianMTModel)
    sources = (Path(data) / "test.en").read_text().splitlines()
    translations = transformer.translate(model, tokenizer, sources, batch_size=16)
    assert translations == (folder / "test.hyp.de").read_text().splitlines()
    assert (
        bleu(translations, (Path(data) / "test.de").read_text().splitlines())["score"]
        == record["metrics"]["test_bleu"]
    )
    # Anybody's call, without our function: beams, length penalty and length are in the saved generation config.
    ids = model.generate(**tokenizer(sources[:1], return_tensors="pt"))
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == translations[0]


@pytest.mark.slow
def test_beams_are_scored_as_in_fairseq(learned):
    """Log-probability, `</s>` included, over length ** 0.6: what `generate` calls a sequence's score."""
    folder, data, _, _ = learned
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    source = tokenizer((Path(data) / "test.en").read_text().splitlines()[0])["input_ids"]
    made = model.generate(torch.tensor([source]), return_dict_in_generate=True, output_scores=True)
    translation = made.sequences[0, 1:].tolist()
    assert translation[-1] == tokens.EOS
    nll = transformer.sentence_nll(model, tokens.collate([{"input_ids": source, "labels": translation}])).item()
    assert made.sequences_scores.item() == pytest.approx(-nll / len(translation) ** 0.6, rel=1e-4)


@pytest.mark.slow
def test_saved_model_is_the_mean_of_the_last_checkpoints(learned):
    folder, _, _, _ = learned
    read = {
        name: AutoModelForSeq2SeqLM.from_pretrained(folder / name).state_dict()
        for name in ("", "checkpoint-80", "checkpoint-100")
    }
    for name, value in read[""].items():
        mean = (read["checkpoint-80"][name].double() + read["checkpoint-100"][name].double()) / 2
        torch.testing.assert_close(value, mean.float(), rtol=0, atol=0)
    weight = "model.shared.weight"
    assert not torch.equal(read[""][weight], read["checkpoint-100"][weight]), "nothing was averaged"


@pytest.mark.slow
def test_scores_are_those_of_models_built_by_hand(learned):
    """
    The best, the last and the mean of the five checkpoints, each read, translated with and scored without the recipe:
    every habit of BLEU by sacrebleu, NLL sentence by sentence.
    """
    folder, data, said, record = learned
    nll = {look["step"]: look["validation_nll"] for look in record["curve"]}
    best = 100 if nll[100] < nll[50] else None
    assert record["steps_of_models"] == {
        "best": [best],
        "last": [100],
        "mean_of_5": [20, 40, 60, 80, 100],
        "saved": [80, 100],
    }
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sources, targets = ((Path(data) / f"test.{end}").read_text().splitlines() for end in ("en", "de"))
    rows = [
        {"input_ids": tokenizer(source)["input_ids"], "labels": tokenizer(target)["input_ids"]}
        for source, target in zip(sources, targets, strict=True)
    ]
    read = [AutoModelForSeq2SeqLM.from_pretrained(folder / f"checkpoint-{step}") for step in (20, 40, 60, 80, 100)]
    mean = {
        name: (sum(model.state_dict()[name].double() for model in read) / 5).float() for name in read[0].state_dict()
    }
    for kind, state in (("last", read[-1].state_dict()), ("best", read[-1].state_dict()), ("mean_of_5", mean)):
        model = transformer.make_transformer("tiny", len(tokenizer)).eval()
        model.load_state_dict(state)
        hypotheses = transformer.translate(model, tokenizer, sources, batch_size=16)
        total = sum(transformer.sentence_nll(model, tokens.collate([row])).item() for row in rows)
        nats = total / sum(len(row["labels"]) for row in rows)
        for name, value in all_scores(hypotheses, targets, nats).items():
            for part in ("validation", "test"):  # the same pairs here
                assert record["metrics"][f"{part}_{name}_{kind}"] == pytest.approx(value, rel=1e-5), (part, name, kind)
    told = record["metrics"]
    assert told["test_nll_mean_of_5"] > told["test_nll_last"], "of early ones too: another model"
    assert told["test_nll"] not in (told["test_nll_mean_of_5"], told["test_nll_last"])
    assert re.search(
        rf"test, mean of 5 +BLEU {told['test_bleu_mean_of_5']:.2f}, .* NLL {told['test_nll_mean_of_5']:.3f} nats, "
        rf"{told['test_nll_bits_mean_of_5']:.3f} bits \(steps 20, 40, 60, 80, 100\)",
        said,
    )


@pytest.mark.slow
def test_scoring_takes_no_longer_than_it_must(learned):
    """Three of the four models are distinct, and each is scored once; training takes about as long."""
    _, _, said, record = learned
    scored = re.findall(r"scores of the model of steps? ([\d, ]+):", said)
    assert scored == ["100", "20, 40, 60, 80, 100", "80, 100"]
    assert 0 < record["seconds_scoring"] < 3 * record["seconds"]


@pytest.mark.slow
def test_checksums_are_those_of_the_files(learned):
    """Both languages' sentences, one file after the other; the tokenizer's are in its file."""
    folder, data, _, record = learned
    for split in ("train", "validation", "test"):
        text = b"".join((Path(data) / f"{split}.{end}").read_bytes() for end in ("en", "de"))
        assert record["corpus_sha256"][split] == hashlib.sha256(text.removesuffix(b"\n")).hexdigest()
    saved = json.loads((folder / "tokenizer.json").read_text())["model"]
    assert record["tokenizer_sha256"] == hashlib.sha256(json.dumps(saved, sort_keys=True).encode()).hexdigest()


@pytest.mark.slow
def test_resume_with_other_tokens_is_refused(learned, tmp_path, monkeypatch, capfd):
    """As many tokens, but of another text; and fewer. With its own tokenizer the checkpoint is gone on from."""
    folder, data, _, record = learned
    checkpoint = folder / "checkpoint-40"
    shown = f"--output_dir {tmp_path} --use_cpu 1 --dataset_name {data} --resume_from_checkpoint {checkpoint}"
    own = next((folder / "tokenizers").iterdir())
    tokenizer = AutoTokenizer.from_pretrained(own)
    other = tokens.train_tokenizer([row["target"][::-1] for row in pairs(400)], len(tokenizer))
    assert len(other) == len(tokenizer)
    tokens.save_tokenizer(other, tmp_path / "as_many" / own.name)
    said = (
        r"resume_from_checkpoint must be of a run with the same tokens, got '.*checkpoint-40' with "
        rf"{len(tokenizer)} \(SHA-256 {record['tokenizer_sha256'][:12]}\), and now "
    )
    as_many = f"--tokenizer_dir {tmp_path / 'as_many'} --vocab_size 600"
    ends_with_one_line(recipe, shown, as_many, rf"{said}{len(tokenizer)} \(", monkeypatch, capfd)
    ends_with_one_line(
        recipe, shown, "--vocab_size 300", rf"{said}300 \(.* Set --tokenizer_dir and", monkeypatch, capfd
    )
    tokens.check_resumed_tokenizer(tokenizer, own, str(checkpoint))
    tokens.check_resumed_tokenizer(other, own, None)


@pytest.mark.slow
def test_no_warning_and_a_picture(learned):
    folder, _, said, _ = learned
    assert "Warning" not in said, said
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_every_panel_of_the_picture_is_filled(learned):
    """What the log calls things, of which the last checkpoint has a copy, is what the panels ask for."""
    folder, _, _, record = learned
    history = json.loads((folder / "checkpoint-100" / "trainer_state.json").read_text())["log_history"]
    figure = records.training_figure(history, ("eval_bleu", "validation BLEU"), record)
    shown = {axis.get_title("left"): [line.get_xydata().tolist() for line in axis.lines] for axis in figure.axes}
    assert [len(lines) for lines in shown.values()] == [1] * 5
    assert [step for step, _ in shown["training loss"][0]] == [*range(10, 101, 10)]
    assert shown["validation BLEU"][0] == [
        [entry["step"], entry["eval_bleu"]] for entry in history if "eval_bleu" in entry
    ]
    assert [step for step, _ in shown["validation BLEU"][0]] == [50, 100]
    assert shown["sent per worker so far, MB"][0][-1] == [100, pytest.approx(record["bytes_sent_per_worker"] / 1e6)]


@pytest.mark.slow
def test_shipped_text_and_the_baseline(tmp_path):
    """
    All-reduce sums gradients over the tokens of both ranks; a few steps on the shipped text, whose BLEU nobody should
    compare.
    """
    said, record = run_recipe(
        tmp_path,
        "--max_train_samples 1000 --max_eval_samples 10 --max_steps 3 --base all_reduce --outer_momentum 0 "
        "--disable_tqdm 1 --num_beams 1",
        really=True,
    )
    assert "BLEU on it is not comparable with WMT's" in record["dataset"]
    assert re.search(r"BLEU of the average .* \(test, 10 rows; not comparable with WMT\)", said)
    assert (record["rounds"], record["steps"], record["bytes_sent_per_worker"]) == (0, 3, None)
    assert record["steps_of_models"] == {name: [3] for name in ("best", "last", "mean_of_5", "saved")}, "none is saved"
    assert re.findall(r"scores of the model of (.*):", said) == ["step 3"], "it is scored once"
    for name in ("bleu", "bleu_tokenised", "bleu_compound_split", "nll", "nll_bits"):
        assert len({record["metrics"][f"test_{name}{kind}"] for kind in ("", "_best", "_last", "_mean_of_5")}) == 1
    assert "average_tokens_across_devices is switched off" not in said
    assert record["curve"][0]["validation_nll"] == pytest.approx(math.log(record["vocab_size"]), rel=0.1)


# ---- flags ----


def test_defaults():
    script, config, args = recipe.parse([])
    assert args.logging_steps % config.sync_every == 0, "logging gathers: only where ranks meet anyway"
    assert (config.outer_momentum, script.dataset_name, script.model_size) == (0.5, None, "tiny")
    assert (args.adam_beta1, args.adam_beta2, args.label_smoothing_factor, args.weight_decay) == (0.9, 0.98, 0.1, 0.0)
    assert (script.num_beams, script.length_penalty) == (4, 0.6)


@pytest.mark.parametrize(
    ("base", "outer_momentum"),
    [("all_reduce", 0.0), ("all_reduce", 0.5), ("local_sgd", 0.0), ("local_sgd", 0.5), ("sgp", 0.0), ("sgp", 0.6)],
)
def test_preset_of_the_paper(base, outer_momentum):
    """
    64 batches of at most 3,584 positions, which hold the paper's 200,000 tokens; 25 epochs; SGP without slow momentum
    never averages exactly.
    """
    script, config, args = recipe.parse(["--preset", "wmt16", "--base", base, "--outer_momentum", str(outer_momentum)])
    expected = SlowMoConfig.paper("wmt16", base, outer_momentum=outer_momentum)
    exact = (base, outer_momentum) != ("sgp", 0.0)
    assert config == dataclasses.replace(expected, exact_average=exact)
    assert (script.max_tokens, args.gradient_accumulation_steps) == (3584, 1)
    assert (args.num_train_epochs, script.model_size, script.vocab_size) == (25, "big", 32_000)
    assert (args.adam_beta1, args.adam_beta2, args.learning_rate, args.warmup_steps) == (0.9, 0.98, 5e-4, 4000)
    assert (args.label_smoothing_factor, args.max_grad_norm) == (0.1, 0.0)
    assert args.logging_steps % config.sync_every == 0
    assert args.output_dir.endswith(f"wmt16_{base}{'_slowmo' if outer_momentum else ''}")


def test_preset_of_ott_et_al():
    script, config, args = recipe.parse(["--preset", "ott"])
    assert (config.base, config.has_rounds) == ("all_reduce", False)
    assert (script.max_tokens, args.gradient_accumulation_steps, args.learning_rate) == (3584, 16, 1e-3)


def test_flags_beside_a_preset_win(tmp_path):
    flags = (
        f"--base sgp --sync_every 24 --model_size base --learning_rate 7e-4 --dataset_name de --output_dir {tmp_path}"
    )
    script, config, args = recipe.parse(["--preset", "wmt16", *flags.split()])
    assert (config.sync_every, script.model_size, args.learning_rate) == (24, "base", 7e-4)
    assert (script.dataset_name, args.output_dir) == ("de", str(tmp_path))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--sync_every 0", "sync_every must be >= 1 optimizer step, got 0"),
        ("--preset wmt17", r"argument --preset: invalid choice: 'wmt17' \(choose from "),
        ("--preset wmt16 --base gossip", "argument --base: invalid choice: 'gossip'"),
        ("--model_size huge", "argument --model_size.*: invalid choice: 'huge'"),
        (
            "--vocab_size 200",
            "vocab_size must be >= 258 tokens: 256 bytes, padding and end, got 200. Set --vocab_size.",
        ),
        ("--max_length 600 --max_tokens 512", "max_length must be <= max_tokens .*, got 600 with max_tokens=512"),
        (
            "--max_length 2000 --max_tokens 4096",
            "max_length must be .* <= 1024 tokens, the model's positions, got 2000",
        ),
        ("--dropout 1", r"dropout must be in \[0, 1\), got 1.0. Set --dropout."),
        ("--num_beams 0", "num_beams must be >= 1 beam, got 0"),
        (
            "--per_device_train_batch_size 4",
            "per_device_train_batch_size has no effect here, got 4: .*: set --max_tokens. Leave --",
        ),
        ("--generation_max_length 80", "generation_max_length has no effect here, got 80"),
        (
            "--predict_with_generate False",
            "predict_with_generate has no effect here, got False: validation translates",
        ),
        (
            "--average_checkpoints 3",
            "average_checkpoints=3 needs as many at the end, .*got save_strategy=no, .* Set --save_strategy epoch",
        ),
        (
            "--average_checkpoints 3 --save_strategy epoch --save_total_limit 2",
            "average_checkpoints=3 .* save_total_limit=2, ",
        ),
        (
            "--average_checkpoints 3 --save_strategy epoch --save_total_limit 3",
            "average_checkpoints=3 needs as many at the end, and the best .* or set it to 4 or more",
        ),
        ("--adam_beta1 2", "Invalid beta parameter at index 0: 2.0"),
        ("--no_such_flag 1", r"Some specified arguments are not used .* \['--no_such_flag', '1'\]"),
        (
            "--dataset_name /no/such/folder",
            "dataset_name must be .* got '/no/such/folder', which is no folder. Set --dataset_name.",
        ),
        ("--source_lang fr", r"source_lang must be one of the languages \['de', 'en'\], got 'fr'. Set --source_lang."),
        (
            "--max_length 2",
            "max_length must leave training pairs, got 2 tokens, and all are longer. Set --max_length.",
        ),
        (
            "--resume_from_checkpoint /no/such/checkpoint-5",
            "resume_from_checkpoint must be true, false or a checkpoint's folder, got '/no/such/checkpoint-5', ",
        ),
    ],
)
def test_wrong_value_ends_with_one_line(tmp_path, monkeypatch, capfd, flags, said):
    shown = f"--output_dir {tmp_path} --use_cpu 1 --vocab_size 300 --max_train_samples 64 --max_eval_samples 8"
    ends_with_one_line(recipe, shown, flags, said, monkeypatch, capfd)


def test_the_best_checkpoint_has_the_least_nll():
    """Trainer's own default would be the greatest."""
    for metric, greater in (("nll", False), ("eval_nll", False), ("nll_bits", False), ("bleu", True)):
        assert recipe.parse(["--metric_for_best_model", metric])[2].greater_is_better is greater
    args = recipe.parse(["--preset", "wmt16"])[2]
    assert (args.metric_for_best_model, args.greater_is_better, args.save_total_limit) == ("nll", False, 6)


@pytest.mark.parametrize("heads", [4, 2])
def test_resume_of_another_size_is_refused(tmp_path, monkeypatch, capfd, heads):
    """Of two sizes, and with other heads alone, where every weight would fit."""
    monkeypatch.setitem(transformer.MODEL_SIZES, "few", {**transformer.MODEL_SIZES["mini"], "heads": heads})
    transformer.make_transformer("few", 300).save_pretrained(tmp_path / "checkpoint-5")
    shown = f"--output_dir {tmp_path} --use_cpu 1 --resume_from_checkpoint {tmp_path}/checkpoint-5"
    said = (
        rf"resume_from_checkpoint must be of a model of the same size, got '.*point-5' with .*'heads': {heads}\}}, "
        r"and model_size=(tiny|mini) is .*'heads': 4\}\. Set --model_size"
    )
    ends_with_one_line(recipe, shown, "--model_size tiny", said, monkeypatch, capfd)
    if heads == 2:
        ends_with_one_line(recipe, shown, "--model_size mini", said, monkeypatch, capfd)
    recipe.check_resumed_size("few", f"{tmp_path}/checkpoint-5")


def test_resume_with_other_tokens_by_its_file(tokenizer, tmp_path):
    """As many tokens of another text; how a call had them cut and padded is no difference."""
    tokenizer.save_pretrained(tmp_path / "checkpoint-5")
    other = tokens.train_tokenizer([row["target"][::-1] for row in pairs(400)], 600)
    tokenizer("a b c", truncation=True, max_length=2, padding="max_length")
    tokens.check_resumed_tokenizer(tokenizer, tmp_path, f"{tmp_path}/checkpoint-5")
    tokens.check_resumed_tokenizer(AutoTokenizer.from_pretrained(tmp_path / "checkpoint-5"), tmp_path, str(tmp_path))
    with pytest.raises(recipe.SettingError, match=r"got '.*checkpoint-5' with 1,000 \(SHA-256 .* and now 600 \("):
        tokens.check_resumed_tokenizer(other, tmp_path, f"{tmp_path}/checkpoint-5")


def test_averaging_refuses_another_run_s_checkpoints(tmp_path):
    (tmp_path / "checkpoint-500").mkdir()
    flags = f"--output_dir {tmp_path} --save_strategy epoch --average_checkpoints 2"
    with pytest.raises(SystemExit, match=r"output_dir must hold no other run's checkpoints .*checkpoint-500"):
        recipe.parse(flags.split())
    assert recipe.parse(f"{flags} --resume_from_checkpoint true".split())[0].average_checkpoints == 2


# ---- BLEU ----


def sacrebleu_command(references: Path, hypotheses: Path, *flags: str) -> tuple[float, str]:
    """Score and signature that the command line prints."""
    command = [sys.executable, "-m", "sacrebleu", str(references), "-i", str(hypotheses), "-w", "12", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=RECIPE_ENVIRONMENT)
    said = json.loads(done.stdout)
    return said["score"], said["signature"]


@pytest.fixture(scope="module")
def scored(corpus, tmp_path_factory):
    """References of the shipped test set, hypotheses with every seventh word left out, and both as files."""
    references = load_corpus().test["target"][:]
    hypotheses = [" ".join(word for at, word in enumerate(text.split()) if at % 7) for text in references]
    folder = tmp_path_factory.mktemp("scored")
    for name, lines in (("ref", references), ("hyp", hypotheses)):
        (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return references, hypotheses, folder


def test_bleu_by_hand():
    """
    `the cat sat on the mat` for `the cat sat on a mat`: 5/6 words, 3/5 pairs, 2/4 triples, 1/3 quadruples, equally
    long.
    """
    expected = 100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** (1 / 4)
    assert bleu(["the cat sat on the mat"], ["the cat sat on a mat"])["score"] == pytest.approx(expected)
    assert compound_split_bleu(["the cat sat on the mat"], ["the cat sat on a mat"]) == pytest.approx(expected)
    assert bleu(["the cat sat on"], ["the cat sat on a mat"])["score"] == pytest.approx(100 * math.exp(1 - 6 / 4))


def test_bleu_equals_the_command_line(scored):
    references, hypotheses, folder = scored
    score, signature = sacrebleu_command(folder / "ref", folder / "hyp")
    assert 50 < score < 90
    assert bleu(hypotheses, references) == {"score": pytest.approx(score, abs=1e-9), "signature": signature}


def test_compound_split_bleu_equals_the_command_line(scored):
    """On files that are tokenised and split already."""
    references, hypotheses, folder = scored
    for name, lines in (("ref.atat", references), ("hyp.atat", hypotheses)):
        (folder / name).write_text("".join(f"{line}\n" for line in split_compounds(lines, "de")), encoding="utf-8")
    score, _ = sacrebleu_command(
        folder / "ref.atat", folder / "hyp.atat", "--tokenize", "none", "--smooth-method", "none", "--force"
    )
    assert compound_split_bleu(hypotheses, references) == pytest.approx(score, abs=1e-9)
    assert score != pytest.approx(bleu(hypotheses, references)["score"], abs=0.1)


def test_compounds_by_hand():
    assert split_compounds(["Der E-Mail-Test (z.B. heute): 5 - drei."], "de") == [
        "Der E ##AT##-##AT## Mail ##AT##-##AT## Test ( z.B. heute ) : 5 - drei ."
    ]


@pytest.mark.parametrize("metric", [SacreBleu, CompoundSplitBleu])
def test_metrics_are_evaluate_s(metric):
    """Batches added one after the other are one corpus."""
    assert issubclass(metric, evaluate.Metric)
    whole, parts = metric(), metric()
    for word in ("eins zwei drei vier", "fünf sechs sieben acht neun"):
        parts.add_batch(predictions=[word], references=[f"{word} zehn"])
    both = ["eins zwei drei vier", "fünf sechs sieben acht neun"]
    assert parts.compute() == whole.compute(predictions=both, references=[f"{text} zehn" for text in both])
    with pytest.raises(ValueError, match="Mismatch"):
        metric().compute(predictions=["a"], references=["a", "b"])


# ---- the tokenizer ----


def test_tokenizer_gives_every_text_back(tokenizer, tmp_path):
    """Bytes are its alphabet: nothing is unknown, umlauts, other scripts and double spaces come back."""
    texts = ["Größenänderung  von Äpfeln", "naïve €, 漢字, 🙂", "x", '"A&B" - (z.B.)']
    model = transformer.make_transformer("tiny", len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for ours in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        encoded = ours(texts)["input_ids"]
        assert [ours.decode(ids, skip_special_tokens=True) for ids in encoded] == texts
        assert all(ids[-1] == tokens.EOS and tokens.PAD not in ids for ids in encoded)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 1, 1000)


def test_tokenizer_is_one_for_both_languages(tokenizer):
    """A frequent word of either side is one token, with the space before it."""
    assert tokenizer.tokenize("the der") == ["Ġthe", "Ġder"]


@pytest.mark.slow
def test_tokenizer_is_the_same_on_every_machine(tokenizer, tmp_path):
    """Another process, with another number of threads and another hash seed."""
    code = (
        f"import sys; sys.path.insert(0, {str(RECIPES)!r})\n"
        "from translation import tokens as t\nfrom translation.data import load_corpus\n"
        "rows = load_corpus(max_train_samples=2000).train\nprint(t.train_tokenizer(t.sentences_of(rows), "
        "1000).backend_tokenizer.to_str())"
    )
    environment = {
        **RECIPE_ENVIRONMENT,
        "RAYON_NUM_THREADS": "3",
        "TOKENIZERS_PARALLELISM": "true",
        "PYTHONHASHSEED": "7",
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip().splitlines()[-1] == tokenizer.backend_tokenizer.to_str()


def test_tokenizers_that_differ_are_refused(tokenizer, monkeypatch):
    tokens.check_same_tokenizer(tokenizer, Path("here"))
    monkeypatch.setattr(tokens, "gather_object", lambda digests: [*digests, "another"])
    with pytest.raises(
        recipe.SettingError,
        match="tokenizer_dir must hold the same tokenizer on all machines, got different ones in 'here'",
    ):
        tokens.check_same_tokenizer(tokenizer, Path("here"))


def test_saving_a_tokenizer_twice_keeps_the_first(tokenizer, tmp_path):
    other = tokens.train_tokenizer(["a b c"], 300)
    for one in (tokenizer, other):
        tokens.save_tokenizer(one, tmp_path / "folder")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "folder")) == len(tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


# ---- batches ----


def test_batches_by_hand():
    """
    (source, target) lengths; sorted by target, then source: (2,1) (1,2) (3,3) | (2,4) (5,4). With 9 tokens: three rows
    of up to 3, and the fourth would make 4 x 4 > 9; then 4 x 1, for 5 x 2 > 9; then 5 x 1.
    """
    lengths = np.array([[5, 4], [3, 3], [1, 2], [2, 4], [2, 1]])
    assert sorted(sorted(batch) for batch in tokens.make_batches(lengths, 9)) == [[0], [1, 2, 4], [3]]
    assert sorted(sorted(batch) for batch in tokens.make_batches(lengths, 10)) == [[0, 3], [1, 2, 4]]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=80),
    max_tokens=st.integers(40, 200),
    world_size=st.integers(1, 9),
    seed=st.integers(0, 3),
)
def test_every_row_once_and_equally_many_batches_per_rank(lengths, max_tokens, world_size, seed):
    lengths = np.array(lengths)
    ranks = [
        tokens.TokenBatches(lengths, max_tokens, seed=seed, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for epoch in (0, 1, 5):
        for sampler in ranks:
            sampler.set_epoch(epoch)
        batches = [list(sampler) for sampler in ranks]
        assert {len(own) for own in batches} == {len(sampler) for sampler in ranks}
        assert len({len(sampler) for sampler in ranks}) == 1
        order = [batch for together in zip(*batches, strict=True) for batch in together]
        once = tokens.make_batches(lengths, max_tokens, seed, epoch)
        assert order == (once * world_size)[: len(order)], "in the epoch's order, then from its start"
        assert len(order) - len(once) < world_size
        assert sorted(row for batch in once for row in batch) == list(range(len(lengths)))
        assert all(len(batch) * lengths[batch].max() <= max_tokens for batch in once)


def test_tokens_of_an_update_by_hand():
    """
    The batches above with 9 tokens: (2,1) (1,2) (3,3) | (2,4) | (5,4). Targets hold 14 tokens, in 3 x 3 + 4 + 4 = 17
    positions, sources 13 in 3 x 3 + 2 + 5 = 16: three batches. An update of two ranks and two micro-batches has four.
    """
    lengths = np.array([[5, 4], [3, 3], [1, 2], [2, 4], [2, 1]])
    sampler = tokens.TokenBatches(lengths, 9, rank=1, world_size=2)
    assert sampler.tokens_per_update(2) == pytest.approx(
        {
            "source": 4 / 3 * 13,
            "target": 4 / 3 * 14,
            "source_padded": 4 / 3 * 16,
            "target_padded": 4 / 3 * 17,
        }
    )
    assert sampler.padding() == pytest.approx(1 - 27 / 33)


def test_epochs_differ_and_a_seed_repeats():
    lengths = np.random.default_rng(0).integers(3, 12, size=(500, 2))
    first, second = (tokens.make_batches(lengths, 100, seed=1, epoch=epoch) for epoch in (0, 1))
    assert first != second
    assert {tuple(sorted(batch)) for batch in first} != {tuple(sorted(batch)) for batch in second}, (
        "other rows together, too"
    )
    assert sorted(map(len, first)) == sorted(map(len, second))
    assert tokens.make_batches(lengths, 100, seed=1, epoch=1) == second
    assert tokens.make_batches(lengths, 100, seed=2, epoch=1) != second


def test_batches_of_the_shipped_text():
    """As by default: 1,024 tokens; 3.4 % of all positions are padding. Sorted by nothing it would be 55 %."""
    corpus = load_corpus()
    assert (len(corpus.train), len(corpus.validation), len(corpus.test)) == (27_467, 1_262, 1_052)
    tokenizer = tokens.train_tokenizer(tokens.sentences_of(corpus.train), 4000)
    sets = tokens.encode_corpus(corpus, tokenizer, max_length=128)
    assert len(sets.train) == 27_439
    lengths = tokens.token_counts(sets.train)
    assert lengths.mean(axis=0) == pytest.approx([21.1, 23.6], abs=0.1)
    sampler = tokens.TokenBatches(lengths, 1024, world_size=2)
    assert len(sampler) == pytest.approx(340, abs=5)
    assert sampler.padding() == pytest.approx(0.034, abs=0.003)
    per_batch = [lengths[batch, 1].sum() for batch in tokens.make_batches(lengths, 1024)]
    assert np.mean(per_batch) == pytest.approx(955, abs=15)
    assert max(per_batch) <= 1024


def test_collate_by_hand():
    batch = tokens.collate([{"input_ids": [5, 6, 1], "labels": [7, 1]}, {"input_ids": [8, 1], "labels": [9, 4, 1]}])
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[5, 6, 1], [8, 1, 0]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "labels": [[7, 1, -100], [9, 4, 1]],
        "decoder_input_ids": [[0, 7, 1], [0, 9, 4]],
    }
    assert all(value.dtype == torch.int64 for value in batch.values())


def test_long_rows(tokenizer):
    """
    Of training rows the long ones are left out; of the others none, cut at the model's positions with `</s>` kept.
    """
    rows = datasets.Dataset.from_dict({"source": ["the " * 3000, "the"], "target": ["der", "der"]})
    corpus = dataclasses.replace(load_corpus(max_train_samples=1), train=rows, validation=rows, test=rows)
    sets = tokens.encode_corpus(corpus, tokenizer, max_length=128)
    assert sets.train["source"][:] == ["the"]
    assert tokens.token_counts(sets.test).tolist() == [[2, 2], [1024, 2]]
    assert (sets.test["row"][:], sets.test[1]["input_ids"][-1]) == ([1, 0], tokens.EOS)


# ---- the model ----


@pytest.mark.parametrize(("size", "count"), [("base", 60_522_496), ("big", 209_125_376)])
def test_transformer_has_the_published_shape(size, count):
    """
    Trained parameters with 32,000 tokens, d wide, ffn f: a matrix of 32,000 d; 6 encoder layers of 4 (d^2 + d) + (2 d
    f + f + d) + 4 d; 6 decoder layers of 8 (d^2 + d) + (2 d f + f + d) + 6 d. Vaswani et al. say 65 and 213 million,
    with 37,000 tokens.
    """
    d, f = (512, 2048) if size == "base" else (1024, 4096)
    feed = 2 * d * f + f + d
    assert count == 32_000 * d + 6 * (4 * (d * d + d) + feed + 4 * d) + 6 * (8 * (d * d + d) + feed + 6 * d)
    with torch.device("meta"):
        model = transformer.make_transformer(size, 32_000)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    assert (model.config.dropout, model.config.activation_function) == (0.1 if size == "base" else 0.3, "relu")


def test_transformer_by_hand():
    """
    Positions are sines and cosines of pos / 10000^(2i/d), not trained; one matrix embeds and predicts; weights start
    at 1/sqrt(d).
    """
    torch.manual_seed(0)
    model = transformer.make_transformer("tiny", 4000).eval()
    shared = model.model.shared.weight
    assert model.lm_head.weight is shared
    assert model.model.encoder.embed_tokens.weight is shared
    assert model.model.decoder.embed_tokens.weight is shared
    assert shared.detach().std().item() == pytest.approx(128**-0.5, rel=0.01)
    assert model.model.encoder.embed_scale == pytest.approx(128**0.5)
    positions = model.model.encoder.embed_positions.weight
    assert not positions.requires_grad
    assert positions[3, 0].item() == pytest.approx(math.sin(3))
    assert positions[3, 64].item() == pytest.approx(math.cos(3))
    assert positions[3, 1].item() == pytest.approx(math.sin(3 / 10_000 ** (2 / 128)))
    hidden = model.model.encoder(input_ids=torch.tensor([[5, 9, 1]])).last_hidden_state
    assert hidden.mean(-1).abs().max().item() < 1e-5, "post-norm: the last thing that a layer does is to normalise"


def test_smoothed_loss_by_hand():
    """Three tokens, of which one label is missing: (1 - e) of the label's nats and e of the mean over all tokens."""
    logits = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    log_probs = logits.log_softmax(-1)
    output = type("Output", (), {"logits": logits})
    plain, even = -log_probs[0, 0, 0], -log_probs[0, 0].mean()
    loss = transformer.smoothed_loss(output, torch.tensor([[0, -100]]), label_smoothing=0.1)
    assert loss.item() == pytest.approx((0.9 * plain + 0.1 * even).item())
    spread = transformer.smoothed_loss(output, torch.tensor([[0, -100]]), num_items_in_batch=4, label_smoothing=0.1)
    assert spread.item() == pytest.approx(loss.item() / 4)
    assert transformer.smoothed_loss(output, torch.tensor([[0, -100]]), label_smoothing=0.0).item() == pytest.approx(
        plain.item()
    )


def test_nll_of_a_sentence_is_its_own():
    """Whoever shares its batch: padding counts nowhere. A model that knows nothing needs log V nats per token."""
    torch.manual_seed(0)
    model = transformer.make_transformer("tiny", 300).eval()
    rows = [{"input_ids": [5, 6, 1], "labels": [7, 8, 9, 1]}, {"input_ids": [9, 1], "labels": [4, 1]}]
    together = transformer.sentence_nll(model, tokens.collate(rows))
    alone = torch.cat([transformer.sentence_nll(model, tokens.collate([row])) for row in rows])
    torch.testing.assert_close(together, alone)
    with torch.no_grad():
        model.model.shared.weight.zero_()
    torch.testing.assert_close(
        transformer.sentence_nll(model, tokens.collate(rows)), torch.tensor([4.0, 2.0]) * math.log(300)
    )


def test_translations_keep_order_length_and_mode(tokenizer):
    """
    Of an untrained model: sentences of any order give the same translations; nothing is longer than its batch's source
    and 50.
    """
    torch.manual_seed(0)
    model = transformer.make_transformer("tiny", len(tokenizer)).train()
    sentences = ["a", "the long one of these four", "b c", "d"]
    forward = transformer.translate(model, tokenizer, sentences, num_beams=2)
    assert model.training
    assert transformer.translate(model, tokenizer, sentences[::-1], num_beams=2) == forward[::-1]
    assert len(set(forward)) > 1
    ids = torch.tensor([tokenizer("a b")["input_ids"]])
    for beams in (1, 3):
        made = transformer.generate(model.eval(), ids, torch.ones_like(ids), beams)
        assert made.shape[1] <= ids.shape[1] + 50
        assert made[0, 0] == tokens.PAD
        assert made[0, -1] == tokens.EOS
        assert tokens.PAD not in made[0, 1:]


def test_average_of_checkpoints(tmp_path):
    """(1 + 4) / 2 everywhere, positions apart."""
    for value in (1.0, 4.0):
        model = transformer.make_transformer("tiny", 300)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.fill_(value)
        model.save_pretrained(tmp_path / str(value))
    mean = transformer.average_checkpoints([tmp_path / "1.0", tmp_path / "4.0"])
    trained = {name for name in mean if "embed_positions" not in name and name != "final_logits_bias"}
    assert all((mean[name] == 2.5).all() for name in trained)
    assert mean["model.encoder.embed_positions.weight"][3, 0].item() == pytest.approx(math.sin(3))
    assert mean.keys() == model.state_dict().keys()


# ---- the Trainer ----


def trainer_with(folder: str, flags: str = ""):
    """The recipe's Trainer on forty shipped pairs."""
    shown = (
        f"--output_dir {folder} --use_cpu 1 --vocab_size 400 --max_train_samples 300 --max_eval_samples 7 "
        "--disable_tqdm 1"
    )
    script, config, args = recipe.parse(f"{shown} {flags}".split())
    torch.manual_seed(0)
    return recipe.make_trainer(script, config, args, recipe.make_sets(script, args))


def test_schedule_of_the_paper(tmp_path):
    """Linear to 5e-4 in 4,000 steps, then 5e-4 sqrt(4000 / step)."""
    trainer = trainer_with(tmp_path, "--learning_rate 5e-4 --warmup_steps 4000")
    scheduler = trainer.create_scheduler(num_training_steps=100_000)
    factor = scheduler.lr_lambdas[0]
    assert [5e-4 * factor(step) for step in (0, 1, 2000, 4000, 16_000, 40_000)] == pytest.approx(
        [0, 1.25e-7, 2.5e-4, 5e-4, 2.5e-4, 5e-4 * 0.1**0.5]
    )
    assert type(trainer.optimizer) is torch.optim.AdamW
    assert all(
        (group["betas"], group["weight_decay"]) == ((0.9, 0.98), 0.0) for group in trainer.optimizer.param_groups
    )


def see_batches(folder: str) -> tuple:
    """Rows of this rank's batches in two epochs, through the recipe's Trainer."""
    trainer = trainer_with(folder, "--max_tokens 256")
    loader = trainer.get_train_dataloader()
    seen = []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        seen.append([(batch["input_ids"].tolist(), batch["labels"].tolist()) for batch in loader])
    return seen, len(loader), len(trainer.train_dataset)


@pytest.mark.slow
def test_ranks_share_every_epoch(tmp_path):
    """
    Three ranks, equally many batches each, none twice but to fill up; none above 256 tokens; another order in the
    second epoch.
    """
    ranks = run_workers(see_batches, 3, str(tmp_path))
    (steps,) = {length for _, length, _ in ranks}
    (train_rows,) = {rows for _, _, rows in ranks}
    for epoch in (0, 1):
        batches = [json.dumps(batch) for seen, _, _ in ranks for batch in seen[epoch]]
        assert len(batches) == 3 * steps
        assert len(batches) - len(set(batches)) <= 2
        rows = sum(len(source) for source, _ in map(json.loads, set(batches)))
        assert rows == train_rows
        for source, target in map(json.loads, batches):
            assert len(source) * max(len(source[0]), len(target[0])) <= 256
    assert ranks[0][0][0] != ranks[0][0][1]


def resume_in_the_second_epoch(folder: str) -> list:
    """Weights after two epochs in one go, and after a stop in the second."""
    torch.set_num_threads(1)
    flags = (
        "--max_tokens 512 --num_train_epochs 2 --eval_strategy no --sync_every 3 --warmup_steps 2 "
        "--save_strategy steps --save_steps 1"
    )
    made = []
    for resume in (None, "stop"):
        trainer = trainer_with(folder, flags)
        steps = len(trainer.token_batches)
        checkpoint = f"{folder}/checkpoint-{steps + steps // 2}" if resume else None
        trainer.train(resume_from_checkpoint=checkpoint)
        made.append([parameter.detach().clone() for parameter in trainer.model.parameters()])
        assert trainer.state.global_step == 2 * steps
    return made


@pytest.mark.slow
def test_resume_skips_exactly(tmp_path):
    """In the second epoch, whose order is its own: bit for bit the run that was never stopped."""
    for whole, resumed in run_workers(resume_in_the_second_epoch, 2, str(tmp_path)):
        assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def evaluate_on_ranks(folder: str) -> tuple:
    trainer = trainer_with(folder, "--per_device_eval_batch_size 2")
    metrics = trainer.evaluate()
    texts = transformer.decode(
        trainer.processing_class, trainer.predict(trainer.eval_dataset, num_beams=2).predictions[0]
    )
    return metrics, texts, {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.mark.slow
def test_evaluation_counts_every_row_once(tmp_path):
    """
    Seven rows in batches of two on two ranks: one row fills up the last batches, and Seq2SeqTrainer would score it
    twice.
    """
    (metrics, texts, weights), (others, _, _) = run_workers(evaluate_on_ranks, 2, str(tmp_path))
    assert others["eval_nll"] == metrics["eval_nll"]
    trainer = trainer_with(tmp_path)
    trainer.model.load_state_dict(weights)
    rows = trainer.eval_dataset
    assert len(rows) == len(texts) == 7
    assert texts == transformer.translate(
        trainer.model, trainer.processing_class, rows["source"][:], num_beams=2, batch_size=2
    )
    trainer.model.eval()
    nll = sum(transformer.sentence_nll(trainer.model, tokens.collate([row])).item() for row in rows)
    assert metrics["eval_nll"] == pytest.approx(nll / tokens.token_counts(rows)[:, 1].sum(), rel=1e-6)
    assert metrics["eval_bleu"] == pytest.approx(bleu_of(trainer, rows, batch_size=2), abs=1e-9)


def bleu_of(trainer, rows, batch_size: int) -> float:
    texts = transformer.translate(
        trainer.model, trainer.processing_class, rows["source"][:], num_beams=1, batch_size=batch_size
    )
    return bleu(texts, rows["target"][:])["score"]


def average_on_ranks(folder: str) -> tuple:
    """Rank 1 has no checkpoints of its own, and its own end of training was said to be another."""
    rank = torch.distributed.get_rank()
    trainer = trainer_with(f"{folder}/{rank}")
    trainer.state.global_step = 100
    if rank == 0:
        for step, value in ((9, 7.0), (10, 1.0), (100, 4.0)):
            save_filled(trainer, f"{folder}/0/checkpoint-{step}", value)
    models = RunModels(trainer, 2, {})
    models.put(models.chosen["saved"])
    return models.chosen, trainer.model.model.shared.weight.detach().clone()


def save_filled(trainer, folder: str, value: float) -> None:
    """A checkpoint whose embeddings all have this value."""
    model = transformer.make_transformer("tiny", len(trainer.processing_class))
    model.model.shared.weight.data.fill_(value)
    model.save_pretrained(folder)


@pytest.mark.slow
def test_all_ranks_have_the_average(tmp_path):
    (chosen, ours), (same, theirs) = run_workers(average_on_ranks, 2, str(tmp_path))
    assert chosen == same == {"best": [100], "last": [100], "mean_of_5": [9, 10, 100], "saved": [10, 100]}
    # What the Trainer holds is the model of step 100; the file of that name is not read.
    torch.manual_seed(0)
    drawn = trainer_with(f"{tmp_path}/again").model.model.shared.weight
    torch.testing.assert_close(ours, (drawn + 1.0) / 2)
    assert torch.equal(ours, theirs)


def test_models_are_those_of_this_run(tmp_path):
    """
    Steps 10 to 60 are saved, 70 is the end; 20 has the least NLL of validation, 40 has none. A checkpoint of a run
    before is left out until this one writes over it, and so is what holds no model.
    """
    trainer = trainer_with(str(tmp_path))
    for step in (10, 20, 30, 40, 50, 60, 900):
        save_filled(trainer, f"{tmp_path}/checkpoint-{step}", float(step))
    (tmp_path / "checkpoint-800").mkdir()
    others = {path: when for path, when in checkpoints_of_others(str(tmp_path), None).items() if "900" in path.name}
    trainer.state.global_step = 70
    nll = {10: 3.0, 20: 1.0, 30: 2.0, 50: 1.5, 60: math.nan, 70: 1.25}
    trainer.state.log_history = [{"step": step, "eval_nll": value} for step, value in nll.items()]
    end = trainer.model.model.shared.weight.detach().clone()
    models = RunModels(trainer, 3, others)
    assert models.chosen == {
        "best": [20],
        "last": [70],
        "mean_of_5": [30, 40, 50, 60, 70],
        "saved": [50, 60, 70],
    }
    for kind, expected in (
        ("best", torch.full_like(end, 20.0)),
        ("mean_of_5", ((30 + 40 + 50 + 60 + end.double()) / 5).float()),
        ("saved", ((50 + 60 + end.double()) / 3).float()),
        ("last", end),
    ):
        models.put(models.chosen[kind])
        torch.testing.assert_close(trainer.model.model.shared.weight.detach(), expected, rtol=0, atol=0, msg=kind)
    assert RunModels(trainer, 1, others).chosen["saved"] == [70]
    save_filled(trainer, f"{tmp_path}/checkpoint-900", 1.0)
    assert 900 in RunModels(trainer, 1, others).chosen["mean_of_5"]
    # Gone on from 30: what lies there up to it is of this run.
    before = checkpoints_of_others(str(tmp_path), f"{tmp_path}/checkpoint-30")
    assert sorted(path.name for path in before) == [f"checkpoint-{step}" for step in (40, 50, 60, 900)]


@pytest.mark.slow
def test_the_best_checkpoint_stays_beside_the_last_ones(tmp_path):
    """
    Every step is saved, and each is worse than the one before. Trainer keeps the best of three: the mean of the last
    two is of steps 4 and 5, not of 1 and 5.
    """
    trainer = trainer_with(
        str(tmp_path),
        "--max_steps 5 --eval_strategy steps --eval_steps 1 --save_strategy steps --save_steps 1 --save_total_limit 3 "
        "--average_checkpoints 2 --sync_every 1 --max_tokens 256",
    )
    trainer.compute_metrics = lambda _: {"nll": float(trainer.state.global_step)}
    trainer.train()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-4", "checkpoint-5"}
    assert RunModels(trainer, 2, {}).chosen == {
        "best": [1],
        "last": [5],
        "mean_of_5": [1, 4, 5],
        "saved": [4, 5],
    }


def test_what_is_chosen_by_hand():
    assert choose({3: None}) == {"best": [3], "last": [3], "mean_of_5": [3]}
    assert choose({30: 2.0, 4: 1.0, 20: 1.0}) == {"best": [4], "last": [30], "mean_of_5": [4, 20, 30]}
    assert choose({1: math.nan, 2: 2.0, 3: None})["best"] == [2]
    asked = []

    def score(made_of):
        asked.append(made_of)
        return {"test_nll": float(sum(made_of))}

    chosen = {"best": [4], "last": [6], "mean_of_5": [4, 6], "saved": [6]}
    assert named(judge(chosen, score), "saved") == {
        "test_nll_best": 4.0,
        "test_nll_last": 6.0,
        "test_nll_mean_of_5": 10.0,
        "test_nll": 6.0,
    }
    assert asked == [[4], [6], [4, 6]], "no model is scored twice"


def test_all_scores_are_sacrebleu_s(scored):
    """Every habit by a direct call; NLL in both units."""
    references, hypotheses, _ = scored
    references, hypotheses = references[:200], [hypotheses[0].lower(), *hypotheses[1:200]]
    plain = sacrebleu.metrics.BLEU(tokenize="none", smooth_method="none", force=True)
    lower = sacrebleu.metrics.BLEU(tokenize="none", smooth_method="none", force=True, lowercase=True)
    moses = MosesTokenizer(lang="de")
    words = [
        [moses.tokenize(text, return_str=True, escape=False) for text in side] for side in (hypotheses, references)
    ]
    split = [[re.sub(r"(\S)-(\S)", r"\1 ##AT##-##AT## \2", text) for text in side] for side in words]
    found = all_scores(hypotheses, references, 1.5)
    assert found == {
        "bleu": sacrebleu.metrics.BLEU().corpus_score(hypotheses, [references]).score,
        "bleu_tokenised": plain.corpus_score(words[0], [words[1]]).score,
        "bleu_tokenised_lowercase": lower.corpus_score(words[0], [words[1]]).score,
        "bleu_compound_split": plain.corpus_score(split[0], [split[1]]).score,
        "nll": 1.5,
        "nll_bits": 1.5 / math.log(2),
    }
    assert len({round(value, 6) for value in found.values()}) == 6, "no two are the same"


def test_choices_are_said(corpus, tokenizer, capsys):
    script, _, _ = recipe.parse(["--max_length", "20", "--max_tokens", "512"])
    told = dataclasses.replace(corpus, empty_train_rows=3)
    sets = tokens.encode_corpus(told, tokenizer, 20)
    batches = tokens.TokenBatches(tokens.token_counts(sets.train), 512)
    recipe.print_choices(script, sets, batches, 3)
    left, filled, update = capsys.readouterr().out.splitlines()
    long = 2000 - len(sets.train)
    assert long > 100
    assert (
        left
        == f"of 2,003 training pairs 3 with an empty line and {long:,} longer than max_length=20 tokens are left out"
    )
    assert (
        filled
        == f"{len(batches)} batches per epoch and process, each of at most 512 tokens, {batches.padding():.1%} padding"
    )
    held = batches.tokens_per_update(3)
    assert (
        update == f"an update holds {held['target']:,.0f} target tokens on average, {held['target_padded']:,.0f} with "
        "padding: 1 processes, micro-batches of each 3"
    )


# ---- data, and what is wrong with it ----

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
