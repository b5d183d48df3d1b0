"""
What `accelerate launch` and `torchrun` do, from the fork server: a script's processes start with torch imported, in a
tenth of a second instead of ten. Some tests of each script use the real launchers.
"""

from __future__ import annotations

import atexit
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from harness import fork_server, launcher_store, patience, rank_environment

ROOT = Path(__file__).parents[1]
PRINTED_LAUNCH = "-m accelerate.commands.launch --config_file recipes/configs/cpu_two_processes.yaml"
ACCELERATE_LAUNCH = f"{PRINTED_LAUNCH} --main_process_port 0"  # any free one: tests run side by side
RECIPE_ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT / "src"),
}
STOP_SECONDS = 30  # between SIGTERM and SIGKILL, as in torch's launcher


def launch(command: list[str], processes: int, environment: dict[str, str], said: Path, restarts: int = 0) -> int:
    """
    Run a script and its flags in `processes` processes, and all again when one dies; returns the last exit code.

    Args:
        command (`list[str]`): The script's path and its flags.
        environment (`dict[str, str]`): Of the processes, all of it; the launcher's own variables come on top.
        said (`Path`): A file for what they print.
        restarts (`int`, *optional*, defaults to `0`): How often all are started again.
    """
    for attempt in range(restarts + 1):
        store = launcher_store(processes)
        shared = {
            **environment,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": str(attempt),
            "TORCHELASTIC_MAX_RESTARTS": str(restarts),
            "TORCHELASTIC_RUN_ID": "none",
            "ACCELERATE_USE_CPU": "true",
            "ACCELERATE_MIXED_PRECISION": "no",
        }
        workers = [
            fork_server().Process(target=_run, args=(command, {**shared, **rank_environment(rank, processes)}, said))
            for rank in range(processes)
        ]
        for worker in workers:
            worker.start()
        code = _wait(workers)
        if code == 0:
            break
    return code


def _wait(workers: list[Any]) -> int:
    """The first exit code that is not 0, when all have ended."""
    try:
        while any(worker.is_alive() for worker in workers):
            if any(worker.exitcode not in (None, 0) for worker in workers):
                break
            time.sleep(0.02)
        failed = next((worker.exitcode for worker in workers if worker.exitcode), 0)
        for worker in workers:
            if worker.is_alive():
                worker.terminate()
        deadline = time.monotonic() + patience(STOP_SECONDS)
        for worker in workers:
            worker.join(max(0.0, deadline - time.monotonic()))
        return failed
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def _run(command: list[str], environment: dict[str, str], said: Path) -> None:
    """The script as `python script flags` would run it, in this forked process."""
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = list(command)
    sys.path.insert(0, str(Path(command[0]).resolve().parent))
    code: Any = 0
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # as the interpreter does at its end, which a forked child skips
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def run_script(
    command: list[str], processes: int, folder: Path, environment: dict[str, str] = RECIPE_ENVIRONMENT
) -> str:
    """What a script printed that ended well; `folder` is where the text lies meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    said = folder / "said.txt"
    code = launch(command, processes, environment, said)
    text = said.read_text()
    assert code == 0, text[-4000:]
    return text


def run_really(command: list[str], launcher: str = ACCELERATE_LAUNCH) -> str:
    """The same as a user starts it: two processes by `accelerate launch`, or one where `launcher` is empty."""
    done = subprocess.run(
        [sys.executable, *launcher.split(), *command],
        cwd=ROOT,
        env=RECIPE_ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=patience(170),
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-4000:]
    return said
