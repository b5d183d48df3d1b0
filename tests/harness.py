"""
Several processes in a test cost one line: `run_workers(check, world_size=3)`; a fork server has the imports done.
"""

from __future__ import annotations

import functools
import multiprocessing
import multiprocessing.forkserver
import os
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

# Warnings are errors; each exception says why it is not ours to mend.
ALLOWED_WARNINGS = [
    # torch's own note where a DataLoader asks for pinned memory on a machine without a GPU (Trainer's default).
    ("ignore", ".*pin_memory.*", UserWarning),
    # torch: gloo's ProcessGroup is destroyed with the process.
    ("ignore", ".*destroy_process_group.*", UserWarning),
    # torch.jit deprecations on import of optional parts of torch.
    ("ignore", ".*torch.jit.*", DeprecationWarning),
    # torch 2.14 deprecates tracing, which programs still do, and a test.
    ("ignore", ".*torch.jit.trace.*", FutureWarning),
    # transformers 5.23 renames gradient checkpointing; peft still asks by the old name, and so do we, for transformers
    # 4.57.
    ("ignore", ".*gradient_checkpointing.*", FutureWarning),
    # accelerate 1.15 asks torch's mesh for the flattened dimension that it shards over.
    ("ignore", "Slicing a flattened dim.*", UserWarning),
    # torch.compile advises against this patch release of Python.
    ("ignore", "Guards may run slower on Python 3.13.0.*", RuntimeWarning),
    # torch 2.15's compiler asks every tensor for its gradient, FSDP2's unsharded parameters too.
    ("ignore", "The .grad attribute of a Tensor that is not a leaf.*", UserWarning),
    # torch 2.6's SequentialLR steps its own schedulers in the way that it warns of.
    ("ignore", "The epoch parameter in `scheduler.step.*", UserWarning),
    # transformers 4.57 sorts checkpoints of one second by their numbers.
    ("ignore", "mtime may not be reliable.*", UserWarning),
]

IS_TRANSFORMERS_4 = Version(version("transformers")) < Version("5")

if Version(version("transformers")) < Version("5.18"):
    # There Trainer loads the optimizer of a job of several CPU processes to "cpu:0", which torch does not know: such a
    # job cannot be resumed, nor a stock one. In tests it can: the rest of a resume is tested with old versions too.
    torch.serialization.register_package(
        9, lambda storage: None, lambda storage, place: storage if place.startswith("cpu:") else None
    )


PATIENCE = float(os.environ.get("TEST_PATIENCE", "1"))


def patience(seconds: float) -> float:
    """A test's time limit, times the environment's TEST_PATIENCE: a busy machine fails no test with a larger one."""
    return seconds * PATIENCE


def warnings_are_errors() -> None:
    """The same filters in worker processes as in pytest's own."""
    warnings.simplefilter("error")
    for action, message, category in ALLOWED_WARNINGS:
        warnings.filterwarnings(action, message=message, category=category)  # type: ignore[arg-type]


# Imported once by the fork server; `frozen_heap` comes last. A module that fails there is left out silently.
PRELOADED = [
    *("torch", "transformers", "accelerate", "slowmo_hf", "slowmo_hf.adapters.callback", "transformers.trainer"),
    *("transformers.models.bert.modeling_bert", "torch._dynamo", "pytest"),
]


def fork_server() -> Any:
    """One fork server for the test session: a worker starts in tens of milliseconds."""
    with _server_lock:
        _start_server()
    return multiprocessing.get_context("forkserver")


_server_lock = threading.Lock()


@functools.cache
def _start_server() -> None:
    multiprocessing.get_context("forkserver").set_forkserver_preload([*PRELOADED, "frozen_heap"])
    before = os.environ.get("PYTHONPATH")
    # Python 3.11 preloads before it takes over sys.path: the server must find this folder by itself.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *([before] if before else [])])
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


def launcher_store(world_size: int) -> torch.distributed.TCPStore:
    """The job's key-value store, in the test's own process as in a launcher's: it outlives every rank."""
    return torch.distributed.TCPStore("127.0.0.1", 0, world_size, is_master=True, wait_for_workers=False)


def rank_environment(rank: int, world_size: int) -> dict[str, str]:
    """What torchrun tells each process of a machine."""
    return {
        "TORCHELASTIC_RUN_ID": "none",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }


def _worker(
    rank: int, world_size: int, port: int, folder: str, backend: str, check: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ.update(ACCELERATE_USE_CPU="true" if backend == "gloo" else "false", OMP_NUM_THREADS="1")
    if world_size > 1:
        os.environ.update(rank_environment(rank, world_size))
    warnings_are_errors()
    try:
        if world_size > 1:
            store = torch.distributed.TCPStore("127.0.0.1", port, world_size, is_master=False)
            torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size)
        torch.manual_seed(1234)
        result = check(*args)
        torch.save(result, f"{folder}/{rank}.pt")
        if world_size > 1:
            if Version(torch.__version__) < Version("2.9"):
                time.sleep(0.1)  # torch 2.6 may hang in the next line right after a gather; a stock program, too
            torch.distributed.destroy_process_group()
    except BaseException:
        Path(f"{folder}/{rank}.error").write_text(traceback.format_exc())
        os._exit(1)


def run_workers(
    check: Callable[..., Any], world_size: int, *args: Any, backend: str = "gloo", time_limit_seconds: float = 90
) -> list[Any]:
    """
    Run `check(*args)` in `world_size` processes, one thread each, under the environment that torchrun sets; with
    another backend than gloo in fresh ones, which import all anew.

    Args:
        check (`Callable`): A module-level function. It finds its rank in `torch.distributed`.
        world_size (`int`): 1 starts one process without `torch.distributed`.

    Returns:
        `list`: What each rank returned.

    Raises:
        AssertionError: A rank failed (the first one's traceback is shown) or the time limit passed.
    """
    with tempfile.TemporaryDirectory() as folder:
        # CUDA cannot be used in a process forked from one that has asked for it, which an import may do.
        context = fork_server() if backend == "gloo" else multiprocessing.get_context("spawn")
        store = launcher_store(world_size)
        workers = [
            context.Process(
                target=_worker, args=(rank, world_size, store.port, folder, backend, check, args), daemon=True
            )
            for rank in range(world_size)
        ]
        for worker in workers:
            worker.start()
        _wait(workers, folder, patience(time_limit_seconds))
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world_size)]


def _wait(workers: list[Any], folder: str, time_limit_seconds: float) -> None:
    deadline = time.monotonic() + time_limit_seconds
    try:
        while any(worker.is_alive() for worker in workers):
            failed = [worker for worker in workers if worker.exitcode not in (None, 0)]
            if failed and time.monotonic() > deadline - time_limit_seconds:
                for worker in workers:
                    worker.join(timeout=5)  # a rank that failed too leaves its own word
                break
            assert time.monotonic() < deadline, (
                f"ranks {[r for r, w in enumerate(workers) if w.is_alive()]} still run: time limit"
            )
            time.sleep(0.01)
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.kill()
            worker.join()
    words = {rank: Path(f"{folder}/{rank}.error") for rank in range(len(workers))}
    told = "\n".join(f"rank {rank}:\n{path.read_text()}" for rank, path in words.items() if path.exists())
    assert not told, told
    assert all(worker.exitcode == 0 for worker in workers), f"exit codes {[w.exitcode for w in workers]}"
