"""A recipe's run over several parts: it stays that run, and its record counts all of it."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import Trainer

from harness import run_workers
from image import train as recipe
from image.small_resnet import make_model
from one_run import OneRun, checkpoint_to_resume, settings_of
from records import SettingError
from slowmo_hf import SlowMoCallback, SlowMoConfig
from tiny import Regression, Rows, arguments, ends_with_one_line
from translation import settings as translation

CONFIG = SlowMoConfig(sync_every=3)


def part(folder: Path, steps: int, config: SlowMoConfig = CONFIG, **settings):
    """Train up to a step, and what it has counted; with a checkpoint at every second step and a log at every fifth."""
    args = arguments(folder, max_steps=steps, save_strategy="steps", save_steps=2, logging_steps=5, **settings)
    asked = settings_of(config, args, {"model_size": "tiny"})
    resumed = checkpoint_to_resume(args, asked)
    trainer = Trainer(Regression(), args, train_dataset=Rows(64), callbacks=[SlowMoCallback(config)])
    run = OneRun(trainer, asked)
    trainer.train(resume_from_checkpoint=resumed)
    return run


def noted(checkpoint: Path) -> dict:
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return state["stateful_callbacks"]["OneRun"]["attributes"]


def in_one_go_and_in_parts(folder: str) -> tuple:
    """Eight steps; four and four more; and those again, where nothing is left to train."""
    whole = part(Path(folder) / "whole", 8)
    parts = [part(Path(folder) / "parts", steps, resume_from_checkpoint="true") for steps in (4, 8, 8)]
    return tuple((run.rounds, run.bytes_sent, run.seconds, run.seconds_communicating) for run in (whole, *parts))


def test_a_run_in_parts_counts_as_one(tmp_path):
    """Rounds at steps 3 and 6, with their bytes: the log, at steps 5 and 8, comes behind the first checkpoints."""

    def seconds_at(step):
        return noted(tmp_path / f"parts/checkpoint-{step}")["seconds"]

    ranks = run_workers(in_one_go_and_in_parts, 2, str(tmp_path))
    for whole, first, second, again in ranks:
        assert whole[:2] == second[:2] == again[:2]
        assert (first[0], second[0]) == (1, 2)
        assert 0 < first[1] < second[1]
        assert 0 < seconds_at(4) < second[2]
        assert seconds_at(4) < seconds_at(8) < again[2]
    _, first, second, again = ranks[0]  # whose seconds are noted
    assert 0 < first[3] < second[3] == again[3] < again[2]


def test_another_run_does_not_go_on(tmp_path):
    """A requeued job runs the same command; one with another setting would be told as what it is not."""
    part(tmp_path, 4, learning_rate=0.05)
    other = SlowMoConfig(sync_every=3, outer_momentum=0.25)
    with pytest.raises(SettingError, match=r"outer_momentum must be 0.5 to go on .*, got 0.25. Set --outer_mom"):
        part(tmp_path, 8, other, learning_rate=0.05, resume_from_checkpoint="true")
    rest = {"adam_beta2": 0.98, "max_grad_norm": 0.25, "label_smoothing_factor": 0.1, "data_seed": 7}
    rest |= {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 3}
    usual = [(name, getattr(arguments(tmp_path), name), now) for name, now in rest.items()]
    for name, was, now in (("learning_rate", 0.05, 0.01), ("seed", 42, 7), *usual):
        with pytest.raises(SettingError, match=f"{name} must be {was} to go on with the run in .*, got {now}"):
            part(tmp_path, 8, resume_from_checkpoint="true", **{"learning_rate": 0.05, name: now})
    longer = part(tmp_path, 6, learning_rate=0.05, resume_from_checkpoint="true", dataloader_num_workers=0)
    assert (longer.rounds, longer.changed_on_resume) == (2, []), "what is no setting of the model may change"


def test_an_error_offers_what_leads_on(tmp_path):
    """What a checkpoint brings back cannot be changed behind it, nor can what a resume refuses."""
    part(tmp_path, 4, learning_rate=0.05)
    path, way = str(tmp_path / "checkpoint-4"), "; to change it on the way set --resume_from_checkpoint to a"
    for name, was, now in (("learning_rate", 0.05, 0.01), ("weight_decay", 0.0, 0.1)):
        settings = {"learning_rate": 0.05, name: now}
        with pytest.raises(SettingError, match=rf"{name} must be {was} to go on with .*--output_dir .* own\.$"):
            part(tmp_path, 8, resume_from_checkpoint="true", **settings)
        with pytest.raises(SettingError, match=rf"{name} must be {was} to go on from .*leave --resume_from_.* own\.$"):
            part(tmp_path, 8, resume_from_checkpoint=path, **settings)
    for config, leads_on in ((SlowMoConfig(sync_every=4), False), (SlowMoConfig(sync_every=3, outer_lr=0.5), True)):
        with pytest.raises(SettingError, match="to go on with the run in") as error:
            part(tmp_path, 8, config, learning_rate=0.05, resume_from_checkpoint="true")
        assert (way in str(error.value)) == leads_on
    args = arguments(tmp_path, resume_from_checkpoint="true")
    state = json.loads((tmp_path / "checkpoint-4/trainer_state.json").read_text())
    state["stateful_callbacks"]["OneRun"]["attributes"]["settings"]["dataset_name"] = None
    (tmp_path / "checkpoint-4/trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(SettingError, match=r"must be None to .* Leave --dataset_name out, or set --output"):
        checkpoint_to_resume(args, {"dataset_name": "mine"})


@pytest.mark.parametrize(("scheduler", "rate"), [("constant", 0.05), ("linear", 0.05 * 2 / 8)])
def test_a_schedule_may_change_on_the_way(tmp_path, scheduler, rate):
    """At step 6 of 8, of both parameter groups."""
    part(tmp_path, 4, learning_rate=0.05, lr_scheduler_type="linear")
    args = {"lr_scheduler_type": scheduler, "resume_from_checkpoint": str(tmp_path / "checkpoint-4")}
    part(tmp_path, 8, learning_rate=0.05, **args)
    assert torch.load(tmp_path / "checkpoint-6/scheduler.pt")["_last_lr"] == pytest.approx([rate, rate])


def test_what_is_changed_on_the_way_is_told(tmp_path):
    """With the checkpoint's own path a setting may change; the record has it, and what comes later too."""
    part(tmp_path, 4)
    changed = part(
        tmp_path,
        6,
        SlowMoConfig(sync_every=3, outer_momentum=0.25),
        resume_from_checkpoint=str(tmp_path / "checkpoint-4"),
    )
    assert changed.changed_on_resume == [[4, "outer_momentum", 0.5, 0.25]]
    assert noted(tmp_path / "checkpoint-6")["settings"]["outer_momentum"] == 0.25
    back = part(tmp_path, 8, resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert back.changed_on_resume == [[4, "outer_momentum", 0.5, 0.25], [6, "outer_momentum", 0.25, 0.5]]


def test_a_save_that_was_cut_off_is_not_gone_on_from(tmp_path):
    """The newest folder is of a killed save: the one before it is taken, as `Trainer` would."""
    part(tmp_path, 4)
    (tmp_path / "checkpoint-6").mkdir()
    args = arguments(tmp_path, resume_from_checkpoint="true")
    assert Path(checkpoint_to_resume(args, {})).name == "checkpoint-4"
    for asked in ("false", None, str(tmp_path / "checkpoint-2")):
        args.resume_from_checkpoint = asked
        assert checkpoint_to_resume(args, {}) == (None if asked == "false" else asked)
    stock = tmp_path / "stock"
    (stock / "checkpoint-9").mkdir(parents=True)
    (stock / "checkpoint-9/trainer_state.json").write_text('{"global_step": 9}')
    assert checkpoint_to_resume(arguments(stock, resume_from_checkpoint="true"), {"seed": 1}) is not None


def test_the_recipe_ends_with_one_line(tmp_path, monkeypatch, capfd):
    """As a Slurm script asks, with another slow momentum than the checkpoint's."""
    part(tmp_path, 4, learning_rate=0.05)
    shown = f"--output_dir {tmp_path} --use_cpu 1 --max_train_samples 64 --resume_from_checkpoint true --sync_every 3"
    said = r"learning_rate must be 0.05 to go on with the run in output_dir=.*, got 0.1. Set --learning_rate, or"
    ends_with_one_line(recipe, shown, "", said, monkeypatch, capfd)
    flag = "--restore_callback_states_from_checkpoint true"
    ends_with_one_line(
        recipe, shown, flag, r"restore_callback_states_from_checkpoint must be false", monkeypatch, capfd
    )


def test_a_checkpoint_of_no_folder_or_of_another_model(tmp_path, monkeypatch, capfd):
    """Trainer would say that no checkpoint is valid, and torch which weights are of another size."""
    asked = tmp_path / "checkpoint-4"
    shown = f"--output_dir {tmp_path} --use_cpu 1 --max_train_samples 64 --resume_from_checkpoint {asked}"
    said = f"resume_from_checkpoint must be true, false or a checkpoint's folder, got '{asked}', which is no folder"
    ends_with_one_line(recipe, shown, "", said, monkeypatch, capfd)
    make_model(28, 1, ["a", "b", "c"], width=4).save_pretrained(asked)
    (asked / "trainer_state.json").write_text('{"global_step": 4}')
    for width, there in ((4, r"'num_labels': 3\}"), (5, r"'embedding_size': 4, 'hidden_sizes': \[4, 8, 16\]")):
        said = (
            f"resume_from_checkpoint must be of a model of the same size, got '{asked}' with .*{there}.*, and this "
            rf"run's of '.*fashion.*' is .*_size': {width}, .*'num_labels': 10\}}\. Set --architecture, --width a"
        )
        ends_with_one_line(recipe, shown, f"--width {width}", said, monkeypatch, capfd)


FREE = {"preset", "plot", "max_eval_samples"}  # a preset gives others their values
FREE_OF = {
    recipe: {"test_split"},
    # The tokens of a resume are compared themselves.
    translation: {"validation_set", "test_set", "tokenizer_dir", "average_checkpoints", "num_beams", "length_penalty"},
}


@pytest.mark.parametrize("flags", FREE_OF, ids=["image", "translation"])
def test_every_flag_of_a_recipe_is_what_its_model_was_trained_by_or_free(flags):
    names = [field.name for field in fields(flags.ScriptArguments)]
    assert sorted([*flags.TRAINED_BY, *FREE, *FREE_OF[flags]]) == sorted(names)
