"""The translation recipe's Trainer: schedule, exact resume, evaluation, averaged and chosen models."""

import dataclasses
import json
import math

import pytest
import torch

from harness import run_workers
from translation import model as transformer
from translation import tokens
from translation import train as recipe
from translation.bleu import bleu
from translation.judged import choose, judge, named
from translation.trainer import RunModels, checkpoints_of_others


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


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "--save_strategy epoch",
        "--save_strategy epoch --gradient_accumulation_steps 3",
        "--save_strategy steps --max_steps 10",
    ],
)
def test_what_a_signal_saved_is_in_no_mean(tmp_path, flags):
    """Two checkpoints as training writes them, three that follow in turn, and one that a signal left in between."""
    trainer = trainer_with(str(tmp_path), f"{flags} --save_steps 5 --num_train_epochs 2 --max_tokens 1024")
    trainer.train()
    every = trainer.saves_every()
    written = sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*"))
    assert every > 1
    assert written[:2] == [every, 2 * every]
    for step in (3 * every, 3 * every + 1, 4 * every):
        save_filled(trainer, f"{tmp_path}/checkpoint-{step}", float(step))
    trainer.state.global_step = 5 * every
    chosen = RunModels(trainer, 3, {}).chosen
    assert chosen["mean_of_5"] == [every, 2 * every, 3 * every, 4 * every, 5 * every]
    assert chosen["saved"] == chosen["mean_of_5"][-3:]
    # The end is saved too, where `save_strategy` is steps, at whatever step it is; the best is put back behind it.
    save_filled(trainer, f"{tmp_path}/checkpoint-{5 * every + 1}", 1.0)
    trainer.state.global_step = 5 * every + 1
    trainer.state.best_model_checkpoint = f"{tmp_path}/checkpoint-{2 * every}"
    trainer.args.load_best_model_at_end = True
    assert RunModels(trainer, 1, {}).chosen["last"] == [5 * every + 1]


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
