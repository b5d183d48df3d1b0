"""The translation recipe, run as a user runs it, on shipped text."""

import hashlib
import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, MarianMTModel

import records
from corpora import pairs, sacrebleu_command, write_text
from launcher import run_really, run_script
from tiny import ends_with_one_line
from translation import model as transformer
from translation import tokens
from translation import train as recipe
from translation.bleu import bleu
from translation.data import load_corpus
from translation.judged import all_scores

RECORD_KEYS = """
    study task preset dataset languages train_rows validation_set validation_rows test_set test_rows model_size
    vocab_size max_tokens tokens_per_update num_beams length_penalty averaged_checkpoints metrics bleu_signature
    curve curve_num_beams model base slowmo exact_average workers processes sync_every outer_lr outer_momentum
    inner_optimizer inner_lr inner_state seed steps rounds bytes_sent_per_worker seconds seconds_communicating
    command versions commit hardware corpus_sha256 tokenizer_sha256 steps_of_models seconds_scoring changed_on_resume
    settings mixed_precision
"""


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
    assert set(record) == set(RECORD_KEYS.split())
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
        False,
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
    entries = json.loads((folder / "checkpoint-100/trainer_state.json").read_text())["log_history"]
    last = [entry["loss"] for entry in entries if "loss" in entry][-1]  # a pass is one step here
    assert record["metrics"]["training_loss"] == last
    assert record["metrics"]["training_loss_bits"] == pytest.approx(last / math.log(2))
    assert record["changed_on_resume"] == []
    assert f"target tokens per update {held['target']:,.0f}, {held['target_padded']:,.0f} with padding" in said
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
    shown += " --learning_rate 3e-3"
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
