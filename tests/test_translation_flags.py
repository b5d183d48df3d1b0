"""The translation recipe's flags, and runs that may not be taken up."""

import dataclasses

import pytest
from transformers import AutoTokenizer

from corpora import pairs, write_text
from slowmo_hf import SlowMoConfig
from tiny import ends_with_one_line
from translation import model as transformer
from translation import tokens
from translation import train as recipe


def test_defaults():
    script, config, args = recipe.parse([])
    assert args.logging_steps % config.sync_every == 0, "logging gathers: only where ranks meet anyway"
    assert (config.outer_momentum, script.dataset_name, script.model_size) == (0.0, None, "tiny"), "two workers, Adam"
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
        (
            "--train_sampling_strategy group_by_length",
            "train_sampling_strategy has no effect here, got 'group_by_length': .*of like length already",
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
        rf"resume_from_checkpoint must be of a model of the same size, got '.*point-5' with .*_heads': {heads}\}}, "
        r"and model_size=(tiny|mini) is .*_heads': 4\}\. Set --model_size"
    )
    ends_with_one_line(recipe, shown, "--model_size tiny", said, monkeypatch, capfd)
    if heads == 2:
        ends_with_one_line(recipe, shown, "--model_size mini", said, monkeypatch, capfd)
    ends_with_one_line(
        recipe,
        f"--output_dir {tmp_path} --resume_from_checkpoint {tmp_path}/checkpoint-6",
        "",
        "resume_from_checkpoint must be true, false or a checkpoint's folder, got '.*point-6', which is no folder",
        monkeypatch,
        capfd,
    )


def test_resume_with_other_tokens_by_its_file(tokenizer, tmp_path):
    """As many tokens of another text; how a call had them cut and padded is no difference."""
    tokenizer.save_pretrained(tmp_path / "checkpoint-5")
    other = tokens.train_tokenizer([row["target"][::-1] for row in pairs(400)], 600)
    tokenizer("a b c", truncation=True, max_length=2, padding="max_length")
    tokens.check_resumed_tokenizer(tokenizer, tmp_path, f"{tmp_path}/checkpoint-5")
    tokens.check_resumed_tokenizer(AutoTokenizer.from_pretrained(tmp_path / "checkpoint-5"), tmp_path, str(tmp_path))
    with pytest.raises(recipe.SettingError, match=r"got '.*checkpoint-5' with 1,000 \(SHA-256 .* and now 600 \("):
        tokens.check_resumed_tokenizer(other, tmp_path, f"{tmp_path}/checkpoint-5")
    (tmp_path / "checkpoint-5/tokenizer.json").write_text('{"version"')
    said = r"tokenizer that can be read, got '.*checkpoint-5' \(tokenizer\.json: .*\)\. Set --resume_from_checkpoint"
    with pytest.raises(recipe.SettingError, match=said):
        tokens.check_resumed_tokenizer(tokenizer, tmp_path, f"{tmp_path}/checkpoint-5")


def test_text_that_was_mended_has_tokens_of_its_own(tmp_path, capfd):
    """As many lines in the same folder, of which one is another: the kept tokenizer would split it as the old one."""
    rows = pairs(120)
    flags = f"--dataset_name {tmp_path / 'text'} --output_dir {tmp_path / 'out'} --use_cpu 1 --vocab_size 400"
    script, _, args = recipe.parse([*flags.split(), "--disable_tqdm", "1"])
    kept, learned = tmp_path / "out" / "tokenizers", []
    for words in ("", 200 * " xyzzy"):
        rows[0]["source"] += words
        write_text(tmp_path / "text", {"train": rows, "validation": rows[:5], "test": rows[:5]})
        learned.append(tokens.tokens_sha256(recipe.make_sets(script, args).tokenizer.backend_tokenizer))
    assert len(set(learned)) == 2
    names = {path.name for path in kept.iterdir()}
    assert len(names) == 2
    recipe.make_sets(script, args)
    assert {path.name for path in kept.iterdir()} == names, "found again"
    for path in kept.iterdir():
        (path / "tokenizer.json").write_text("{")
    with pytest.raises(
        recipe.SettingError, match=r"tokenizer_dir must hold tokenizers that can be read, got '.*Remove"
    ):
        recipe.make_sets(script, args)


def test_averaging_refuses_another_run_s_checkpoints(tmp_path):
    (tmp_path / "checkpoint-500").mkdir()
    flags = f"--output_dir {tmp_path} --save_strategy epoch --average_checkpoints 2"
    with pytest.raises(SystemExit, match=r"output_dir must hold no other run's checkpoints .*checkpoint-500"):
        recipe.parse(flags.split())
    assert recipe.parse(f"{flags} --resume_from_checkpoint true".split())[0].average_checkpoints == 2
