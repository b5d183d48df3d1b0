"""
What a run prints and logs. docs/what_you_see.md shows two programs and all that they print; here they are run, and the
text compared, with numbers, hosts and times masked. And who speaks: rank 0 for the job, a rank for itself.
"""

from __future__ import annotations

import ast
import logging
import math
import re
import warnings
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from transformers import Trainer

import slowmo_hf
from harness import run_workers
from launcher import run_script
from slowmo_hf import SlowMoCallback, SlowMoConfig, SlowMoOptimizer, run_in_process
from slowmo_hf.adapters.trainer_logs import WorkerLosses
from slowmo_hf.log import logger, of_this_rank
from tiny import Heard, LossKeeper, Regression, Rows, arguments

PAGE = Path(__file__).parents[1] / "docs" / "what_you_see.md"


# ---- two runs on paper ----


def blocks(heading):
    """The program and the text below a heading of the page."""
    part = PAGE.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```(?:python|text)\n(.*?)```", part, re.DOTALL)


def masked(text):
    """Numbers as #; an address, a host and what stands before a plural are of the machine."""
    lines = []
    for line in text.splitlines():
        if "kernels" in line or not line.strip():
            continue  # bitsandbytes' own, where it is installed
        line = re.sub(r"( +)(\d+ +\d+ +gloo +)\S+ +\S+$", r"\1\2ADDRESS HOST", line)
        line = re.sub(r"rank \d on \S+\)", "rank # on HOST)", line)
        line = re.sub(r"(?<=times the mean computation\.).*", " ADVICE", line)  # on the machine's speed
        line = re.sub(r"worker \d ", "worker # ", line)
        line = re.sub(r"'(-?\d[\d.e-]*)'", r"\1", line)  # transformers 4.57 prints numbers where 5 prints strings
        line = re.sub(r"(?<![\w#])-?\d[\d,.]*(e-?\d+)?(?= |'|$|,|;|:|\)|\.)", "#", line)
        lines.append(re.sub(r" (ms|s|kB|MB|bytes)\b", " UNIT", line))
    return lines


@pytest.mark.parametrize("heading", ["A Trainer run", "An Accelerate run"])
def test_the_page_shows_what_is_printed(heading, tmp_path):
    program, text = blocks(heading)
    (tmp_path / "program.py").write_text(program)
    said = run_script([str(tmp_path / "program.py")], 2, tmp_path / "said")
    assert masked(said) == masked(text), said


LOGGED = {"info": 0, "warning": 0, "say_once": 1}  # calls that log, and which argument is the text


def texts_of_the_package(calls_alone):
    """Every text in it, or what its log calls say, with X for what is filled in."""
    for path in (Path(slowmo_hf.__file__).parent).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if calls_alone:
                is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
                if not (is_call and node.func.attr in LOGGED and node.args):
                    continue
                node = node.args[LOGGED[node.func.attr]]
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "X" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.sub(r"%(\.\d+)?[sdgr]", "X", node.value).replace("%%", "%")


def lines_of_the_page():
    """First cells of the tables that explain lines, as patterns, those of `Other lines` second."""
    main, other = PAGE.read_text().split("## Other lines\n")
    main, other = main.split("| line | says |")[1].split("\n\n")[0], other.split("\n## ")[0]
    cells = [re.findall(r"^\| ([^|-][^|]*) \|", part, re.MULTILINE) for part in (main, other)]
    return [[re.escape(cell).replace("…", ".*") for cell in part if cell != "line"] for part in cells]


def test_the_page_explains_every_line_that_is_logged():
    main, other = lines_of_the_page()
    said = {text for text in texts_of_the_package(calls_alone=True) if text.strip("X")}
    assert len(said) > 40
    assert len(other) > 35
    unknown = [text for text in said if not any(re.match(line, text) for line in main + other)]
    assert not unknown, unknown
    texts = set(texts_of_the_package(calls_alone=False))
    stale = [line for line in other if not any(re.match(line, text) for text in texts)]
    assert not stale, stale


def test_the_page_explains_every_metric_with_its_unit():
    told = set(re.findall(r"^\| `(slowmo/\w+)`", PAGE.read_text(), re.MULTILINE))
    report = slowmo_hf.training.report.RoundReport(1, 0.0, 0.0, 0.0, 0, 0.0, 0.0)
    assert told >= set(report.to_logs())
    assert told >= {f"slowmo/loss_{name}" for name in ("worker_0", "mean", "min", "min_worker", "max", "max_worker")}


def log_to_tensorboard(folder):
    """As the page says it, in a loop of 6 steps with 2 to a round; what was reported, by step."""
    warnings.simplefilter("ignore")  # tensorboard's own imports
    model, rows, told, config = Regression(torch.float32), Rows(4, torch.float32), {}, SlowMoConfig(sync_every=2)
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=folder)
    accelerator.init_trackers("runs")
    optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), config)
    model, optimizer = accelerator.prepare(model, optimizer)
    for step in range(1, 7):
        accelerator.backward(model(rows.x, rows.y)["loss"] * (1 + dist.get_rank()))
        optimizer.step()
        optimizer.zero_grad()
        if step % config.sync_every == 0:
            told[step] = slowmo_hf.last_round(optimizer).to_logs()
            accelerator.log(told[step], step=step)
    slowmo_hf.finish(optimizer)
    for tracker in accelerator.trackers:  # `end_training` does both, and takes the process group of the test away
        tracker.finish()
    return told


def test_a_loops_reports_reach_tensorboard(tmp_path):
    told, _ = run_workers(log_to_tensorboard, 2, str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tensorboard's own imports
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    [file] = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(told[4]), "utilisation too, which the first round has not"
    for name in told[4]:
        written = {event.step: event.value for event in events.Scalars(name)}
        assert written == pytest.approx({step: logs[name] for step, logs in told.items() if name in logs}), name


# ---- who speaks ----


def speak():
    with Heard() as heard:
        logger.warning("of the job, %d", 7)
        of_this_rank.warning("of rank %d", dist.get_rank())
    return heard.lines


def test_rank_0_speaks_for_the_job_and_each_rank_for_itself():
    mine, other = run_workers(speak, 2)
    assert mine[0] == ("WARNING", "of the job, 7")
    for rank, (level, line) in enumerate((mine[1], other[0])):
        assert level == "WARNING"
        assert re.fullmatch(rf"rank {rank} on \S+: of rank {rank}", line)
    assert (len(mine), len(other)) == (2, 1)


def test_workers_in_one_process_speak_once(caplog):
    def work(rank):
        weight = torch.nn.Parameter(torch.zeros(3))
        optimizer = SlowMoOptimizer(torch.optim.SGD([weight], lr=0.1), SlowMoConfig(sync_every=2))
        for _ in range(14):
            weight.grad = torch.ones(3)
            optimizer.step()
        slowmo_hf.finish(optimizer)

    caplog.set_level("INFO", logger="slowmo_hf")
    run_in_process(work, 3)
    said = [record.getMessage().split(":")[0].split(" at step")[0] for record in caplog.records]
    assert sorted(said) == sorted(set(said)), "nothing twice"
    assert {"3 workers, in this process", "costs", "training ended", "the model is the average of 3 workers"} <= {
        *said
    }


def test_a_users_level_is_respected():
    """Not INFO where the user wants warnings alone."""
    logger.setLevel(logging.WARNING)
    try:
        with Heard() as heard:
            weight = torch.nn.Parameter(torch.zeros(3))
            optimizer = SlowMoOptimizer(torch.optim.SGD([weight], lr=0.1), SlowMoConfig(sync_every=2))
            weight.grad = torch.ones(3)
            optimizer.step()
            slowmo_hf.finish(optimizer)
    finally:
        logger.setLevel(logging.NOTSET)
    assert {level for level, _ in heard.lines} == {"WARNING"}


def two_optimizers():
    models = [Regression(), Regression()]
    optimizers = [SlowMoOptimizer(torch.optim.SGD(m.parameters(), lr=0.1), SlowMoConfig(sync_every=2)) for m in models]
    rows = Rows(4)
    with Heard() as heard:
        for _ in range(14):
            for model, optimizer in zip(models, optimizers, strict=True):
                model(rows.x, rows.y)["loss"].backward()
                optimizer.step()
        for optimizer in optimizers:
            slowmo_hf.finish(optimizer)
    return [line for _, line in heard.lines]


def test_several_optimizers_say_which_one_it_is():
    said, nothing = run_workers(two_optimizers, 2)
    assert nothing == []
    for words in ("costs:", "training ended", "the model is"):
        which = [line.split(")")[0] for line in said if words in line]
        assert which == [f"optimizer {number} (of body.weight and 3 more" for number in (0, 1)], words


# ---- every worker's loss ----


LOGS = {
    "between rounds": ({"logging_steps": 3}, {}),
    "at rounds": ({"logging_steps": 4}, {}),
    "accumulated": ({"logging_steps": 2, "gradient_accumulation_steps": 2}, {}),
    "epochs": ({"logging_strategy": "epoch"}, {}),
    "overlapped": ({"logging_steps": 3}, {"overlap_steps": 2}),
    "gossip": ({"logging_steps": 3}, {"base": "sgp"}),
}


def losses_of_workers(folder):
    out = {}
    for name, (settings, config) in LOGS.items():
        model = LossKeeper()
        trainer = Trainer(
            model=model,
            args=arguments(folder, max_steps=12, **{"logging_strategy": "steps", **settings}),
            train_dataset=Rows(64, torch.float32),
            callbacks=[SlowMoCallback(SlowMoConfig(sync_every=4, **config))],
        )
        trainer.train()
        entries = [entry for entry in trainer.state.log_history if "loss" in entry]
        out[name] = entries, model.losses, trainer.args.gradient_accumulation_steps
    return out


def test_an_entry_has_every_workers_own_mean_loss(tmp_path):
    """Of the steps since the last one; and Trainer's own loss is their mean."""
    ranks = run_workers(losses_of_workers, 2, str(tmp_path))
    for name in LOGS:
        for entries, _, passes in (out[name] for out in ranks):
            assert entries, name
            last = 0
            for entry in entries:
                own = [sum(out[name][1][passes * last : passes * entry["step"]]) for out in ranks]
                told = [entry[f"slowmo/loss_worker_{rank}"] for rank in (0, 1)]
                steps = passes * (entry["step"] - last)
                assert told == pytest.approx([loss / steps for loss in own], rel=1e-5), (name, entry)
                assert sum(told) / 2 == pytest.approx(entry["loss"], rel=1e-4)
                assert told[0] != told[1]
                last = entry["step"]


def test_of_many_workers_an_entry_has_the_ends(monkeypatch):
    from types import SimpleNamespace

    from slowmo_hf.adapters.trainer_logs import WorkerLosses

    losses = object.__new__(WorkerLosses)
    losses._trainer = SimpleNamespace(state=SimpleNamespace(global_step=5))
    by_rank = [float((7 * rank) % 17) for rank in range(17)]
    status = SimpleNamespace(losses=(5, by_rank), somebody_ended_early=False)
    losses._outer_loop = SimpleNamespace(status=status, workers=SimpleNamespace(size=1))
    assert losses.take() == {
        **{"slowmo/loss_mean": 8.0, "slowmo/loss_min": 0.0, "slowmo/loss_min_worker": 0},
        **{"slowmo/loss_max": 16.0, "slowmo/loss_max_worker": by_rank.index(16.0)},
    }
    status.losses = (5, [1.0, 3.0, 5.0, 7.0])
    losses._outer_loop.workers.size = 2
    assert losses.take() == {"slowmo/loss_worker_0": 2.0, "slowmo/loss_worker_1": 6.0}, "a worker of two processes"
    status.losses = (4, [1.0] * 4)
    assert losses.take() == {}, "of another step"


# ---- the end ----


def ended(folder, resumed):
    with Heard() as heard:
        for steps in (8, 12) if resumed else (12,):
            settings = {"save_strategy": "steps", "save_steps": 8} if resumed else {}
            trainer = Trainer(
                model=Regression(torch.float32),
                args=arguments(folder, max_steps=steps, **settings),
                train_dataset=Rows(128, torch.float32),
                callbacks=[SlowMoCallback(SlowMoConfig(sync_every=2))],
            )
            trainer.train(resume_from_checkpoint=steps == 12 and resumed)
    sent = 4 * 32 + 8 * 12  # of 31 parameters, and a header with two learning rates
    return [line for _, line in heard.lines][-3:], sent


@pytest.mark.parametrize("resumed", [False, True])
def test_the_end_is_of_this_process_and_says_so(resumed, tmp_path):
    (said, sent), (nothing, _) = run_workers(ended, 2, str(tmp_path), resumed)
    assert nothing == []
    since, steps, rounds = (" since step 8", 4, 2) if resumed else ("", 12, 6)
    assert said[0] == f"training ended at step 12: {steps} steps and {rounds} rounds{since}"
    kilo = f"{rounds * sent / 1000:.3g} kB" if rounds * sent >= 1000 else f"{rounds * sent} bytes"
    ddp = f"{steps * 124 / 1000:.3g} kB" if steps * 124 >= 1000 else f"{steps * 124} bytes"
    assert said[1].startswith(f"{kilo} sent per worker in rounds and exchanges{since} (DDP: {ddp}); ")
    assert said[2] == "the model is the average of 2 workers at step 12"


def ended_behind_a_round(folder):
    """Of SGP: what its last line says of so many steps, with rounds of 12."""
    found = {}
    for steps in (11, 23):
        with Heard() as heard:
            Trainer(
                model=Regression(torch.float32),
                args=arguments(folder, max_steps=steps),
                train_dataset=Rows(256, torch.float32),
                callbacks=[SlowMoCallback(SlowMoConfig(base="sgp", sync_every=12))],
            ).train()
        found[steps] = [words for _, words in heard.lines if "steps and" in words or "sent per worker" in words]
    return found


def test_what_is_sent_behind_the_last_round_counts(tmp_path):
    """An exchange is 31 parameters, as a step of DDP; the one round has a norm and a header beside them."""
    found, _ = run_workers(ended_behind_a_round, 2, str(tmp_path))
    for steps, rounds in ((11, 0), (23, 1)):
        exchanges = steps - rounds
        sent, ddp = exchanges * 124 + rounds * (4 * 32 + 8 * 12), steps * 124
        planned, _, said = found[steps]
        assert f", {sent / 1000:.3g} kB in all (DDP: {ddp / 1000:.3g} kB)" in planned
        assert said.startswith(f"{sent / 1000:.3g} kB sent per worker in rounds and exchanges (DDP: {ddp / 1000:.3g} ")


def warned(folder, steps, beta):
    with Heard() as heard:
        Trainer(
            model=Regression(torch.float32),
            args=arguments(folder, max_steps=steps),
            train_dataset=Rows(128, torch.float32),
            callbacks=[SlowMoCallback(SlowMoConfig(sync_every=1, outer_momentum=beta))],
        ).train()
    return heard.about("few rounds", "WARNING")


def warned_at_a_resume(folder):
    config = SlowMoConfig(sync_every=2)
    with Heard() as heard:
        for resume, steps in ((False, 40), (True, 44)):
            Trainer(
                model=Regression(torch.float32),
                args=arguments(folder, max_steps=steps, save_strategy="steps", save_steps=40),
                train_dataset=Rows(256, torch.float32),
                callbacks=[SlowMoCallback(config)],
            ).train(resume_from_checkpoint=resume)
    return heard.about("few rounds", "WARNING")


def test_a_resumed_run_has_few_rounds_left_and_no_way_out(tmp_path):
    """Its sync_every cannot change, and the rounds before it did their work."""
    assert run_workers(warned_at_a_resume, 2, str(tmp_path)) == [[], []]


@pytest.mark.parametrize(("steps", "beta", "lines"), [(19, 0.5, 1), (20, 0.5, 0), (3, 0.0, 0)])
def test_few_rounds_are_one_warning_with_the_way_out(steps, beta, lines, tmp_path):
    said, nothing = run_workers(warned, 2, str(tmp_path), steps, beta)
    assert nothing == []
    assert len(said) == lines
    for line in said:
        assert "few rounds: 19 ahead, and slow momentum with outer_momentum=0.5 needs some 20" in line
        assert line.endswith("to do its work. Train for more steps (19)."), "sync_every is 1"


def test_losses_of_bf16_add_up_in_fp32(tmp_path):
    """600 losses of 4.0625: a sum in bf16 would stop at 1024."""
    from types import SimpleNamespace

    from slowmo_hf.adapters.trainer_logs import WorkerLosses

    losses = object.__new__(WorkerLosses)
    losses._trainer = SimpleNamespace(
        args=SimpleNamespace(logging_nan_inf_filter=True), state=SimpleNamespace(global_step=0)
    )
    losses._outer_loop, losses._sum, losses._logged_at = SimpleNamespace(attempted_steps=600), 0.0, 0
    for _ in range(600):
        losses._add(torch.tensor(4.0625, dtype=torch.bfloat16))
    assert losses._mean() == 4.0625


@pytest.mark.parametrize(
    ("workers", "settings", "words"),
    [
        (1, {}, "the one worker's own at step 3: there was nothing to average"),
        (2, {}, "the average of 2 workers at step 3"),
        (2, {"base": "all_reduce"}, "that of all 2 workers at step 3, whose gradients were averaged"),
    ],
)
def test_the_end_says_what_the_model_is(workers, settings, words):
    def work(rank):
        weight = torch.nn.Parameter(torch.zeros(3))
        config = SlowMoConfig(sync_every=2, **settings)
        optimizer = SlowMoOptimizer(torch.optim.SGD([weight], lr=0.1), config)
        for _ in range(3):
            weight.grad = torch.ones(3)
            optimizer.step()
        slowmo_hf.finish(optimizer)

    with Heard() as heard:
        run_in_process(work, workers)
    assert heard.about("the model is") == [f"the model is {words}"]


def test_the_end_names_the_best_checkpoint(tmp_path):
    """Trainer has loaded it; with so large a learning rate it is not the last one."""
    args = arguments(
        tmp_path,
        max_steps=4,
        learning_rate=30.0,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    rows = Rows(16, torch.float32)
    with Heard() as heard:
        trainer = Trainer(
            Regression(torch.float32),
            args,
            train_dataset=rows,
            eval_dataset=rows,
            callbacks=[SlowMoCallback(SlowMoConfig(sync_every=2))],
        )
        trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best in [str(tmp_path / f"checkpoint-{step}") for step in (1, 2, 3)]
    assert heard.about("the model is") == [f"the model is the best checkpoint's, {best}"]


def test_a_loss_after_a_resume_is_the_mean_of_the_steps_since():
    loop = SimpleNamespace(status=SimpleNamespace(own_loss=None), attempted_steps=10)

    class Stub(SimpleNamespace):
        """A weak reference to it can be made."""

    trainer = Stub(state=SimpleNamespace(global_step=8), training_step=lambda: None)
    losses = WorkerLosses(trainer, loop, ExitStack())
    losses._sum = 6.0
    assert loop.status.own_loss() == 3.0


def test_a_loss_that_is_not_finite_counts_as_the_mean_so_far():
    """As in Trainer: the sum so far, 4, over this step and those before it, 2."""
    losses, state = object.__new__(WorkerLosses), SimpleNamespace(global_step=0)
    losses._trainer = SimpleNamespace(args=SimpleNamespace(logging_nan_inf_filter=True), state=state)
    losses._outer_loop, losses._sum, losses._logged_at = SimpleNamespace(attempted_steps=3), 0.0, 0
    for loss in (4.0, math.inf, 8.0):
        losses._add(torch.tensor(loss))
        state.global_step += 1
    assert losses._mean() == (4 + 2 + 8) / 3
