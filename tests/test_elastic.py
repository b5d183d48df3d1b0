"""
Machines that come and go: the programs of docs/elastic.md under real agents of torchrun, three on this machine. They
are killed, told to go, and join; training goes on with as many workers as there are, from the checkpoint's average.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from harness import patience
from launcher import RECIPE_ENVIRONMENT, ROOT

PAGE = ROOT / "docs" / "elastic.md"
# Of a rendezvous, in seconds: how long it waits for more machines, and how soon one that is gone is dropped.
RENDEZVOUS = "--rdzv-conf store_type=file,last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=5"
WAIT_SECONDS = 120  # for anything, on a busy machine
SIGNAL = ": SIGTERM: "


@dataclass(frozen=True)
class Attempt:
    """What the workers of one start have noted, by rank."""

    notes: list[Path]

    def steps(self, rank: int) -> list[int]:
        """Those that this rank began, in order."""
        return sorted(int(path.stem) for path in self.notes[rank].glob("*.pt") if path.stem != "end")

    def weights(self, rank: int, step: int | str) -> list[torch.Tensor]:
        """The parameters that a step begins with; those of the end."""
        return torch.load(self.notes[rank] / f"{step}.pt")

    @property
    def start(self) -> int:
        """The step that all of them begin with."""
        starts = {self.steps(rank)[0] for rank in range(len(self.notes))}
        assert len(starts) == 1
        return starts.pop()


class Machines:
    """
    Agents of torchrun that run a program on one shared folder.

    Args:
        program (`Path`): The program's file.
        folder (`Path`): For its checkpoints, notes, and what the agents print.
        steps (`int`): Of training.
    """

    def __init__(self, program: Path, folder: Path, steps: int) -> None:
        self.program, self.folder, self.steps = program, folder, steps
        self.out, self.notes = folder / "out", folder / "notes"
        self.notes.mkdir(parents=True)
        self.open(0)
        self.agents: list[subprocess.Popen[bytes]] = []

    def join(self) -> None:
        """One machine more."""
        with self.said(len(self.agents)).open("wb") as output:
            self.agents.append(
                subprocess.Popen(
                    [sys.executable, "-u", "-m", "torch.distributed.run", *self._flags()],
                    cwd=ROOT,
                    env={
                        **RECIPE_ENVIRONMENT,
                        "ELASTIC_NOTES": str(self.notes),
                        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
                        "ACCELERATE_USE_CPU": "true",
                    },
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            )

    def _flags(self) -> list[str]:
        of_page = f"--nnodes 2:3 --nproc-per-node 1 --max-restarts 20 --rdzv-id job --rdzv-backend c10d {RENDEZVOUS}"
        store, program = str(self.folder / "rendezvous"), [str(self.program), str(self.out), str(self.steps)]
        return [*of_page.split(), "--rdzv-endpoint", store, "tests/elastic.py", *program]

    def said(self, machine: int) -> Path:
        """What an agent and its workers print."""
        return self.folder / f"machine_{machine}.txt"

    def open(self, step: int) -> None:
        """Let all workers train to this step and wait there."""
        (self.notes / "next").write_text(str(step))
        (self.notes / "next").rename(self.notes / "gate")

    def train(self, workers: int, step: int, after: Attempt | None = None) -> Attempt:
        """Until so many workers, started after those of another attempt, wait at a step."""

        def ready() -> Attempt | None:
            newest: dict[str, Path] = {}
            for path in sorted(self.notes.glob(f"*_of_{workers}")):
                newest[path.name.split("_")[1]] = path
            found = Attempt([newest[str(rank)] for rank in range(workers)]) if len(newest) == workers else None
            is_later = found and (after is None or min(found.notes) > max(after.notes))
            return found if is_later and all((path / f"{step}.pt").exists() for path in found.notes) else None

        return self.wait(ready)

    def wait(self, ready: Callable[[], Any]) -> Any:
        """Until something is there."""
        until = time.monotonic() + patience(WAIT_SECONDS)
        while not (there := ready()):
            said = "\n".join(self.said(machine).read_text()[-3000:] for machine in range(len(self.agents)))
            assert time.monotonic() < until, said
            assert any(agent.poll() is None for agent in self.agents), said
            time.sleep(0.05)
        return there

    def wait_for_words(self, words: str, machines: set[int]) -> None:
        """Until these have said it since they were last asked."""
        self.wait(lambda: all(words in self.said(machine).read_text() for machine in machines))

    def machine_of(self, attempt: Attempt, rank: int) -> int:
        """Where a worker lives."""
        parent = int(
            Path(f"/proc/{(attempt.notes[rank] / 'pid').read_text()}/stat").read_text().split(") ")[1].split()[1]
        )
        return next(number for number, agent in enumerate(self.agents) if agent.pid == parent)

    def kill(self, attempt: Attempt, rank: int) -> int:
        """A machine is gone: its agent and its worker, at once. Which one it was."""
        machine = self.machine_of(attempt, rank)
        self.agents[machine].kill()
        os.kill(int((attempt.notes[rank] / "pid").read_text()), signal.SIGKILL)
        return machine

    def end(self) -> None:
        """Nobody is left."""
        for agent in self.agents:
            agent.kill()
            agent.wait()
        for path in self.notes.glob("*/pid"):
            with suppress(ProcessLookupError):
                os.kill(int(path.read_text()), signal.SIGKILL)


@contextmanager
def machines(heading: str, folder: Path, steps: int) -> Iterator[Machines]:
    """The program below a heading of the page, on machines that are gone afterwards."""
    folder.mkdir(exist_ok=True)
    part = PAGE.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    (folder / "train.py").write_text(re.findall(r"```python\n(.*?)```", part, re.DOTALL)[0])
    found = Machines(folder / "train.py", folder, steps)
    try:
        yield found
    finally:
        found.end()


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


def saved_model(folder: Path) -> list[torch.Tensor]:
    """Weight and bias."""
    tensors = load_file(folder / "model.safetensors")
    return [tensors[name] for name in sorted(tensors, key=lambda name: name.endswith("bias"))]


def check_start(attempt: Attempt, checkpoint: Path) -> None:
    """All workers begin with the model of a checkpoint, bit for bit."""
    average = saved_model(checkpoint)
    for rank in range(len(attempt.notes)):
        assert equal(attempt.weights(rank, attempt.start), average)


def check_end(attempt: Attempt, folder: Path, steps: int) -> None:
    """Every step was done, and all end with the model that was saved."""
    for rank in range(len(attempt.notes)):
        assert attempt.steps(rank) == list(range(attempt.start, steps))
        assert equal(attempt.weights(rank, "end"), saved_model(folder))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_trainer_goes_on_with_two_and_with_three_machines(tmp_path):
    """
    Rounds every 4 steps, saves every 6. Of three machines one is killed in step 9: they are missed at the round of
    12, and two go on from the save of 6. One joins while they are at 15: they save at the round of 16, and three go
    on from there.
    """
    with machines("Trainer", tmp_path, steps=24) as cluster:
        cluster.open(9)
        for _ in range(3):
            cluster.join()
        three = cluster.train(3, 9)
        # The save lies inside a round: workers differ, and their mean is the model.
        local = [three.weights(rank, 6) for rank in range(3)]
        assert not equal(local[0], local[1])
        for own, saved in zip(zip(*local, strict=True), saved_model(cluster.out / "checkpoint-6"), strict=True):
            torch.testing.assert_close(torch.stack(own).mean(0), saved)
        dead = cluster.kill(three, 2)
        cluster.open(15)

        two = cluster.train(2, 15, after=three)
        assert two.start == 6
        check_start(two, cluster.out / "checkpoint-6")
        cluster.join()
        cluster.wait_for_words(SIGNAL, {0, 1, 2} - {dead})
        cluster.open(99)
        assert [agent.wait(patience(WAIT_SECONDS)) for agent in cluster.agents] == [
            -signal.SIGKILL if machine == dead else 0 for machine in range(4)
        ]
        again = cluster.train(3, 23, after=two)
        assert two.steps(0) == two.steps(1) == list(range(6, 16))
        assert again.start == 16, "no step is done again"
        check_start(again, cluster.out / "checkpoint-16")
        check_end(again, cluster.out, steps=24)
        said = "".join(cluster.said(machine).read_text() for machine in range(4))
    assert re.search(
        r"rank 2 on \S+ left without a word after step [89]; .* It was missed at step 12, the round", said
    )
    assert "resumed with 2 workers in place of 3: all start from the average with the shared velocity" in said
    assert said.count("SIGTERM: all ranks save when the next") == 2
    assert "saved at step 16 after a signal: exit code 75 asks for a requeue" in said
    assert "resumed with 3 workers in place of 2: all start from the average with the shared velocity" in said
    assert "with every worker's own state" not in said
    assert "training ended at step 24: 8 steps and 2 rounds since step 16" in said


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_custom_loop_goes_on_with_three_and_with_two_machines(tmp_path):
    """
    Two machines; one joins at step 3; then the one of rank 0 is told to go at step 7. Both times all save at the next
    round, 4 and 8, and no step is done again.
    """
    with machines("Accelerate", tmp_path, steps=12) as cluster:
        cluster.open(3)
        for _ in range(2):
            cluster.join()
        two = cluster.train(2, 3)
        cluster.join()
        cluster.wait_for_words(SIGNAL, {0, 1})
        cluster.open(7)
        three = cluster.train(3, 7, after=two)
        left = cluster.machine_of(three, 0)
        heard = cluster.said(left).read_text().count(SIGNAL)
        cluster.agents[left].send_signal(signal.SIGTERM)
        cluster.wait(lambda: cluster.said(left).read_text().count(SIGNAL) > heard)
        cluster.open(99)
        assert [agent.wait(patience(WAIT_SECONDS)) for agent in cluster.agents if agent != cluster.agents[left]] == [
            0,
            0,
        ]
        rest = cluster.train(2, 11, after=three)
        assert (three.start, rest.start) == (4, 8)
        check_start(three, cluster.out / "4")
        check_start(rest, cluster.out / "8")
        check_end(rest, cluster.out, steps=12)
        said = "".join(cluster.said(machine).read_text() for machine in range(3))
    assert "resumed with 3 workers in place of 2: all start from the average with the shared velocity" in said
    assert "resumed with 2 workers in place of 3: all start from the average with the shared velocity" in said
    assert "training ended at step 12: 4 steps and 1 rounds since step 8" in said
