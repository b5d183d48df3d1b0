"""
The quickstart pages: their programs run as they are printed and as their commands say, and print what the pages show.
And the page of settings: its blocks make what it says, its tables have every field and its default.
"""

from __future__ import annotations

import re
import shlex
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from packaging.version import Version
from safetensors.torch import load_file

import slowmo_hf
from harness import patience, run_workers
from launcher import RECIPE_ENVIRONMENT, run_script
from slowmo_hf import SlowMoConfig, SlowMoOptimizer
from test_what_one_sees import masked
from tiny import equal

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {"quickstart_trainer": "train.py", "quickstart_accelerate": "program.py"}
# What each rank leaves for the test, behind the page's program.
AFTER = """
rank = torch.distributed.get_rank()
trained = trainer.model if "trainer" in globals() else accelerator.unwrap_model(model)
history = trainer.state.log_history if "trainer" in globals() else None
torch.save((trained.state_dict(), history), f"rank{rank}.pt")
"""


def blocks(page, kind):
    """The code blocks of a page that begin with this word, in their order."""
    return re.findall(rf"^```{kind}\n(.*?)^```", (DOCS / f"{page}.md").read_text(), re.DOTALL | re.MULTILINE)


def commands(page, words):
    """The commands of a page with these words in them."""
    lines = [line.split("#")[0].strip() for block in blocks(page, "bash") for line in block.splitlines()]
    return [line for line in lines if words in line]


def write_program(page, folder):
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / PAGES[page]
    program.write_text(blocks(page, "python")[0].replace("accelerator.end_training()\n", "") + AFTER)
    return program


def told(text):
    """
    The masked lines without transformers' bars; the costs once, for how often they come is on the machine's speed.
    """
    lines = [line for line in masked(text) if "Writing model shards" not in line and "run.py" not in line]
    costs = [number for number, line in enumerate(lines) if line.startswith("[slowmo_hf] costs")]
    return [line for number, line in enumerate(lines) if number not in costs[1:]]


def left_by(folders):
    """The weights and the log of every rank; all ranks have the same weights, bit for bit."""
    (mine, history), (other, other_history) = (
        torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank, folder in enumerate(folders)
    )
    assert equal(mine, other)
    return mine, history, other_history


def assert_trained(folders):
    """Of the Trainer's program."""
    weights, history, other_history = left_by(folders)
    assert equal(load_file(folders[0] / "trained/model.safetensors"), weights)
    for entries in (history, other_history):
        losses = [entry for entry in entries if "loss" in entry]
        assert [entry["slowmo/round"] for entry in losses] == [8, 16, 24]
        assert losses[-1]["loss"] < 0.35 < 0.6 < losses[0]["loss"]  # ln 2 is 0.693
        for entry in losses:
            assert set(of_the_table()) <= entry.keys()
            both = entry["slowmo/loss_worker_0"] + entry["slowmo/loss_worker_1"]
            assert both / 2 == pytest.approx(entry["loss"], rel=1e-3)
            # 8 rounds of a ring of two: the weights and a sum of squares in fp32, and a header.
            assert entry["slowmo/bytes_sent"] == 8 * (4 * (29_378 + 1) + 8 * (10 + 2))
        assert [entry["eval_accuracy"] > 0.9 for entry in entries if "eval_accuracy" in entry][-1]
    for step in (96, 192, 288):
        for worker, folder in enumerate(folders):
            assert (folder / f"outputs/checkpoint-{step}/slowmo/worker_{worker}.pt").exists()
    return weights


def of_the_table():
    """The metrics that the page names."""
    page = (DOCS / "quickstart_trainer.md").read_text()
    return re.findall(r"^\| `(slowmo/\w+)`", page, re.MULTILINE)


@pytest.mark.slow
def test_the_trainers_program_prints_what_the_page_shows(tmp_path):
    program = write_program("quickstart_trainer", tmp_path)
    program.write_text(f"import os\nos.chdir({str(tmp_path)!r})\n{program.read_text()}")
    said = run_script([str(program)], 2, tmp_path / "said")
    assert told(said) == told(blocks("quickstart_trainer", "text")[0]), said
    assert_trained([tmp_path, tmp_path])


# ---- Accelerate ----


def losses_of(said):
    return [float(line.split()[-1]) for line in said.splitlines() if line.startswith("epoch ")]


def assert_summed(folders, said):
    """The loss falls, and the saved model is near the sum of its inputs."""
    weights, _, _ = left_by(folders)
    losses = losses_of(said)
    assert len(losses) == 5
    assert losses[-1] < losses[0] / 10
    assert equal(load_file(folders[0] / "trained/model.safetensors"), weights)
    assert torch.allclose(weights["weight"], torch.ones(1, 4), atol=0.2)
    return weights


@pytest.mark.skipif(Version(version("accelerate")) < Version("1.10"), reason="ranks are dealt other rows with 1.3")
def test_the_accelerate_program_prints_what_the_page_shows(tmp_path):
    program = write_program("quickstart_accelerate", tmp_path)
    program.write_text(f"import os\nos.chdir({str(tmp_path)!r})\n{program.read_text()}")
    said = run_script([str(program)], 2, tmp_path / "said")
    (text,) = blocks("quickstart_accelerate", "text")
    assert told(said) == told(text), said
    assert losses_of(said) == pytest.approx(losses_of(text), rel=1e-2)
    assert_summed([tmp_path, tmp_path], said)


class Kept(GeneralTracker):
    """A tracker of one's own: what it was given."""

    name, requires_logging_directory, tracker = "kept", False, None

    def __init__(self):
        super().__init__()
        self.entries = []

    def store_init_configuration(self, values):
        pass

    def log(self, values, step, **kwargs):
        self.entries.append((step, values))


def on_all_ranks(value):
    found = [torch.zeros_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(found, value.contiguous())
    return found


def run_the_blocks():
    """The page's blocks behind its program, in their order, in a loop of 14 steps and then of 5 and 3."""
    consensus, log, joined, several = blocks("quickstart_accelerate", "python")[1:]
    tracker = Kept()
    accelerator = Accelerator(cpu=True, log_with=tracker)
    accelerator.init_trackers("test")
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1, dtype=torch.float64)
    optimizer = SlowMoOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.02), SlowMoConfig(timeout_seconds=patience(30))
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    generator = torch.Generator().manual_seed(accelerator.process_index)

    def batch():
        inputs = torch.randn(8, 4, generator=generator, dtype=torch.float64)
        return inputs, inputs.sum(1, keepdim=True)

    names = {
        **{"torch": torch, "slowmo_hf": slowmo_hf, "SlowMoConfig": SlowMoConfig, "SlowMoOptimizer": SlowMoOptimizer},
        **{"accelerator": accelerator, "model": model, "optimizer": optimizer},
        **{"loss_of": torch.nn.functional.mse_loss, "evaluate": lambda model: model.module.weight.detach().clone()},
        **{"maker": torch.nn.Linear(2, 2), "judge": torch.nn.Linear(2, 1)},
    }
    for step in range(1, 15):
        inputs, labels = batch()
        accelerator.backward(names["loss_of"](model(inputs), labels))
        optimizer.step()
        optimizer.zero_grad()
        if step in (11, 12):
            exec(log, {**names, "step": step})
    own = model.module.weight.detach().clone()
    exec(consensus, names)
    torch.testing.assert_close(names["exact"], sum(on_all_ranks(own)) / 2, rtol=0, atol=1e-14)
    assert torch.equal(model.module.weight, own)
    assert [(step, values["slowmo/round"]) for step, values in tracker.entries] == (
        [(12, 1)] if accelerator.is_main_process else []
    )
    names["loader"] = [batch() for _ in range(5 if accelerator.process_index else 3)]
    exec(joined, names)
    finished = on_all_ranks(model.module.weight.detach())
    exec(several, names)
    for _ in range(13):
        for network, one in ((names["maker"], "maker_optimizer"), (names["judge"], "judge_optimizer")):
            accelerator.backward(network(torch.randn(4, 2, generator=generator)).square().mean())
            names[one].step()
            names[one].zero_grad()
    ends = []
    for network, one in ((names["maker"], "maker_optimizer"), (names["judge"], "judge_optimizer")):
        before = on_all_ranks(network.module.weight.detach())
        slowmo_hf.finish(names[one])
        torch.testing.assert_close(network.module.weight, sum(before) / 2)
        ends.append(not torch.equal(*before) and torch.equal(*on_all_ranks(network.module.weight.detach())))
    return torch.equal(*finished), ends


def test_every_block_of_the_accelerate_page_does_what_the_page_says():
    assert run_workers(run_the_blocks, 2) == [(True, [True, True])] * 2


# ---- the commands, by the real launcher ----


def start(command, folder, **replaced):
    """A `torchrun` line of a page, as written but for what a test's machine needs."""
    for old, new in replaced.items():
        command = command.replace(old, new)
    words = shlex.split(command)
    assert words[0] == "torchrun"
    with (folder / "said.txt").open("w") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *words[1:]],
            cwd=folder,
            env=RECIPE_ENVIRONMENT,
            stdout=said,
            stderr=subprocess.STDOUT,
        )


def end(launchers, folders):
    try:
        for launcher, folder in zip(launchers, folders, strict=True):
            assert launcher.wait(patience(120)) == 0, (folder / "said.txt").read_text()[-4000:]
    finally:
        for launcher in launchers:
            launcher.kill()


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


@pytest.mark.slow
def test_the_trainers_command_on_one_machine(tmp_path):
    write_program("quickstart_trainer", tmp_path)
    (command,) = commands("quickstart_trainer", "--nproc-per-node 2")
    end([start(command, tmp_path)], [tmp_path])
    assert_trained([tmp_path, tmp_path])


@pytest.mark.slow
def test_the_trainers_commands_on_two_machines(tmp_path):
    """
    Two launchers, each in a folder of its own as without a shared file system. The weights are those of two processes
    on one machine, bit for bit.
    """
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        write_program("quickstart_trainer", folder)
    lines = commands("quickstart_trainer", "--nnodes 2")
    assert len(lines) == 2
    ways = {"192.168.1.10": "127.0.0.1", "29500": free_port()}
    launchers = [start(line, folder, **ways) for line, folder in zip(lines, (first, second), strict=True)]
    end(launchers, [first, second])
    weights = assert_trained([first, second])
    said = (first / "said.txt").read_text()
    assert "2 workers, one process each, on 2 machine(s)" in said
    assert blocks("quickstart_trainer", 'text title="log"')[0].strip() in said
    assert not (second / "trained").exists()
    one = tmp_path / "one"
    program = write_program("quickstart_trainer", one)
    program.write_text(f"import os\nos.chdir({str(one)!r})\n{program.read_text()}")
    run_script([str(program)], 2, one / "said")
    assert equal(assert_trained([one, one]), weights)


@pytest.mark.slow
def test_the_accelerate_commands_on_one_machine_and_on_two(tmp_path):
    one, first, second = tmp_path / "one", tmp_path / "first", tmp_path / "second"
    for folder in (one, first, second):
        write_program("quickstart_accelerate", folder)
    (command,) = commands("quickstart_accelerate", "--nproc-per-node 2")
    end([start(command, one)], [one])
    weights = assert_summed([one, one], (one / "said.txt").read_text())
    lines = commands("quickstart_accelerate", "--nnodes 2")
    assert len(lines) == 2
    ways = {"192.168.1.10": "127.0.0.1", "29500": free_port()}
    end([start(line, folder, **ways) for line, folder in zip(lines, (first, second), strict=True)], [first, second])
    assert equal(assert_summed([first, second], (first / "said.txt").read_text()), weights)
    assert not (second / "trained/model.safetensors").exists()


# ---- settings ----


def test_the_page_of_settings_has_every_field_with_its_default():
    page = (DOCS / "choosing_settings.md").read_text().split("## Every field")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)`[^|]*\| ([^|]+) \|", page, re.MULTILINE))
    config = SlowMoConfig()
    values = {name: str(value) for name, value in config.to_dict().items()}
    values |= {"outer_optimizer_kwargs": "none", "bucket_bytes": f"{config.bucket_bytes / 2**20:g} MiB"}
    values |= {"timeout_seconds": f"{config.timeout_seconds:g}"}
    assert {name: cell.strip("`").strip('"') for name, cell in rows.items()} == values


def test_the_presets_and_flags_of_the_page(monkeypatch):
    made, parsed = blocks("choosing_settings", "python")
    names = {}
    exec(made, names)
    assert (names["callback"].config.compression, names["callback"].config.overlap_steps) == ("int8", 2)
    page = (DOCS / "choosing_settings.md").read_text()
    presets = re.findall(r"^\| `(SlowMoConfig\.\w+\(.*?\))` \|", page, re.MULTILINE)
    assert len(presets) == 5
    for preset in presets:
        assert isinstance(eval(preset), SlowMoConfig)
    (command,) = commands("choosing_settings", "--base")
    flags = shlex.split(command.partition("train.py")[2])
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, "--use_cpu", "True", "--report_to", "none"])
    exec(parsed, names)
    config = names["config"]
    assert (config.base, config.outer_momentum, config.sync_every) == ("sgp", 0.6, 48)
    assert names["args"].output_dir == "outputs"
