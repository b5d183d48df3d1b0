"""
One launch of a job that is killed on its way and started again, and its comparison, bit for bit, with a launch that
was never killed.

`benchmarks/kill_switch.py` runs in the script's place: it kills, and notes what every process passes through.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from slowmo_hf import verify_checkpoint

ROOT = Path(__file__).resolve().parent.parent
SAVE_STEPS = 2  # of every job
ATTEMPT_SECONDS = 30.0  # for each process: a launch that takes longer per attempt hangs
UNKNOWN = -1


@dataclass(frozen=True)
class Job:
    """A run that goes on by itself when it is started again: script and flags, processes."""

    command: str
    processes: int = 2


@dataclass(frozen=True)
class Kill:
    """
    A moment at which one rank of one attempt dies: the `nth` of its kind, from 0.

    Args:
        delay_ms (`float`, *optional*): The signal comes so much later, from outside.
    """

    attempt: int
    rank: int
    kind: str
    nth: int
    delay_ms: float | None = None


@dataclass
class Run:
    """What a launch has left: its exit code, seconds, words, and the notes of every process by attempt and rank."""

    folder: Path
    exit_code: int
    seconds: float
    said: str
    notes: dict[tuple[int, int], list[list[str]]]

    @property
    def attempts(self) -> int:
        """How often the launcher started the processes."""
        return 1 + max((attempt for attempt, _ in self.notes), default=-1)

    @property
    def ranks(self) -> range:
        """Of all attempts: one that was killed at its start may lack some."""
        return range(1 + max((rank for _, rank in self.notes), default=-1))

    def weights(self, attempt: int) -> list[list[str]]:
        """Every rank's digests as its training steps began."""
        return [
            [note[1] for note in self.notes.get((attempt, rank), []) if note[0] == "weights"] for rank in self.ranks
        ]

    def checkpoints(self) -> list[Path]:
        """The oldest first."""
        return sorted((self.folder / "out").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


# ---- a launch ----


Launcher = Callable[[list[str], int, dict[str, str], Path, int], int]


def accelerate_launch(
    command: list[str], processes: int, environment: dict[str, str], said: Path, restarts: int
) -> int:
    """
    `accelerate launch` of a script and its flags, which prints into `said`; its exit code, -1 of one that hangs.
    """
    config = "recipes/configs/cpu_two_processes.yaml"
    launcher = f"-m accelerate.commands.launch --config_file {config} --main_process_port 0"
    # c10d and the variable below: with torch 2.13 a launcher's own store keeps the dead attempt's addresses, which the
    # next one's ranks take for each other's, and hang (https://github.com/pytorch/pytorch/issues/135712). A store in a
    # file needs no port.
    restarting = (
        f"--num_processes {processes} --rdzv_backend c10d --rdzv_conf store_type=file --max_restarts {restarts}"
    )
    with said.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *launcher.split(), *restarting.split(), *command],
            cwd=ROOT,
            env={**environment, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            return process.wait(ATTEMPT_SECONDS * processes * (restarts + 1))
        except subprocess.TimeoutExpired:
            return -1
        finally:
            _end(process)


def launch(job: Job, folder: Path, kills: tuple[Kill, ...] = (), launcher: Launcher = accelerate_launch) -> Run:
    """Run a job, in a new folder, through all its kills."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "notes").mkdir(parents=True)
    script, *flags = job.command.split()
    command = ["benchmarks/kill_switch.py", script, "--output_dir", str(folder / "out"), *flags]
    start, said = time.perf_counter(), folder / "said"
    exit_code = launcher(command, job.processes, _environment(folder, kills), said, len(kills))
    return Run(folder, exit_code, time.perf_counter() - start, said.read_text(), _read_notes(folder / "notes"))


def _environment(folder: Path, kills: tuple[Kill, ...]) -> dict[str, str]:
    plan = json.dumps([asdict(kill) for kill in kills])
    ours = {"KILL_NOTES": str(folder / "notes"), "KILL_WATCHED": str(folder / "out"), "KILL_PLAN": plan}
    libraries = {
        "ACCELERATE_USE_CPU": "true",
        "HF_HUB_OFFLINE": "1",
        "PYTHONFAULTHANDLER": "1",
    }
    return {**os.environ, **ours, **libraries, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}


def _end(process: subprocess.Popen[bytes]) -> None:
    """The launcher ends its processes; one that hangs is ended with its whole session."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _read_notes(folder: Path) -> dict[tuple[int, int], list[list[str]]]:
    notes = {}
    for path in folder.glob("attempt_*_rank_*.jsonl"):
        _, attempt, _, rank = path.stem.split("_")
        notes[int(attempt), int(rank)] = [json.loads(line) for line in path.read_text().splitlines()]
    return notes


# ---- the comparison ----


def differences(reference: Run, run: Run, kills: tuple[Kill, ...]) -> list[str]:
    """How a run that was killed differs from the one that never was, in words; empty where nothing does."""
    if run.exit_code or run.attempts != len(kills) + 1:
        return [f"exit code {run.exit_code} after {run.attempts} attempts, {len(kills)} kills were planned"]
    told = [f"{kill} was never reached" for kill in kills if met(run, kill) is None]
    told += _different_weights(reference, run)
    expected, found = end_state(reference), end_state(run)
    told += [
        f"{name} differs at the end" for name in sorted({*expected, *found}) if expected.get(name) != found.get(name)
    ]
    told += _different_checkpoints(reference, run)
    return told + [str(error) for path in run.checkpoints() for error in _not_whole(path)]


def met(run: Run, kill: Kill) -> str | None:
    """Where the kill came, in words; None where its moment was never reached."""
    return next((note[2] for note in run.notes.get((kill.attempt, kill.rank), []) if note[0] == "kill"), None)


def _different_weights(reference: Run, run: Run) -> list[str]:
    """
    Every attempt's steps are steps of the reference on all ranks, and no more than what followed the last save is
    lost.
    """
    whole, told, reached = reference.weights(0), [], -1
    for attempt, starts in enumerate(first_steps(reference, run)):
        weights = run.weights(attempt)
        for rank, (mine, start) in enumerate(zip(weights, starts, strict=True)):
            if start is not None and mine != whole[rank][start : start + len(mine)]:
                told.append(f"attempt {attempt}, rank {rank}: weights differ after it had begun at step {start}")
        begun = {start for start in starts if start is not None}
        if not begun:
            continue
        if len(begun) > 1 or not -1 <= reached - min(begun) < SAVE_STEPS:
            told.append(f"attempt {attempt} begins at step {sorted(begun)}, step {reached} had been reached")
        reached = max(start + len(mine) - 1 for mine, start in zip(weights, starts, strict=True) if start is not None)
    return (
        told if reached == len(whole[0]) - 1 else [*told, f"the last step begun is {reached} of {len(whole[0]) - 1}"]
    )


def _different_checkpoints(reference: Run, run: Run) -> list[str]:
    """
    The same; or older ones too where the kill came before their deletion and the last attempt had nothing left to do
    or to save.
    """
    expected, found = ([path.name for path in one.checkpoints()] for one in (reference, run))
    had_steps = any(run.weights(run.attempts - 1))
    is_same = found == expected or (not had_steps and found[-len(expected) :] == expected)
    return [] if is_same else [f"checkpoints at the end: {found}"]


def first_steps(reference: Run, run: Run) -> list[list[int | None]]:
    """
    By attempt and rank, the steps behind the first one; None where none began, UNKNOWN where the reference has no such
    weights.
    """
    places = [{digest: step for step, digest in enumerate(digests)} for digests in reference.weights(0)]
    weights = [run.weights(attempt) for attempt in range(run.attempts)]
    return [
        [places[rank].get(mine[0], UNKNOWN) if mine else None for rank, mine in enumerate(attempt)]
        for attempt in weights
    ]


def end_state(run: Run) -> dict[str, str]:
    """
    SHA-256 of what the files of the last checkpoint and the final model hold: every rank's own state is among them.

    Of the folders of a sharded save (DCP) the model's is among them, loaded as a whole: it is the average. The
    optimizer's is left out: torch takes workers for replicas and writes each tensor of it once, from whichever worker,
    a mixture that nobody reads. Every process's own optimizer state is in its file in `slowmo/`.
    """
    newest, out = run.checkpoints()[-1], run.folder / "out"
    files = [path for path in (*newest.rglob("*"), *out.glob("*.safetensors")) if path.name != "training_args.bin"]
    loaders = {".safetensors": load_file, **dict.fromkeys((".pt", ".pth", ".bin", ".pkl"), _load)}
    folders = {
        path.parent for path in files if path.name == ".metadata" and not path.parent.name.startswith("optimizer")
    }
    return {
        **{
            str(path.relative_to(out)): _digest(loaders[path.suffix](path)) for path in files if path.suffix in loaders
        },
        **{str(folder.relative_to(out)): _digest(_load_sharded(folder)) for folder in folders},
    }


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=False)


def _load_sharded(folder: Path) -> Any:
    """All that a sharded save holds, in one process."""
    with tempfile.TemporaryDirectory() as beside:
        dcp_to_torch_save(folder, Path(beside) / "whole.pt")
        return _load(Path(beside) / "whole.pt")


def _digest(value: Any) -> str:
    digest = hashlib.sha256()
    for leaf in _leaves(value):
        digest.update(leaf)
    return digest.hexdigest()


def _leaves(value: Any) -> Iterator[bytes]:
    """A nested value's parts as bytes, the same for equal values."""
    if isinstance(value, dict):
        for key in sorted(value, key=repr):
            yield repr(key).encode()
            yield from _leaves(value[key])
    elif isinstance(value, list | tuple):
        yield f"{len(value)} parts".encode()
        for part in value:
            yield from _leaves(part)
    elif isinstance(value, torch.Tensor):
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        yield value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    else:
        yield value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode()


def _not_whole(checkpoint: Path) -> Iterator[ValueError]:
    try:
        verify_checkpoint(checkpoint)
    except ValueError as error:
        yield error
