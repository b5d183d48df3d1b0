"""What a stage of `dry_run.py` takes, in processes of its own: seconds, and the peak of memory."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets


@contextmanager
def measured(stages: dict[str, dict[str, float]], name: str) -> Iterator[None]:
    """
    Seconds of a stage, on the clock and of all threads on the CPU, and its peak of memory: resident, and resident
    without what is mapped from files, which a machine's processes share.
    """
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    private, over = [0], threading.Event()

    def look() -> None:
        while not over.wait(0.05):
            private[0] = max(private[0], _memory("RssAnon"))

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    start, cpu = time.perf_counter(), cpu_seconds()
    yield
    figures = {"seconds": time.perf_counter() - start, "cpu_seconds": cpu_seconds() - cpu}
    over.set()
    looking.join()
    peaks = {"peak_bytes": _memory("VmHWM"), "peak_private_bytes": max(private[0], _memory("RssAnon"))}
    stages[name] = {**figures, **peaks}
    print(f"{name}: {json.dumps(stages[name])}", flush=True)


def _memory(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    return 0


def cpu_seconds() -> float:
    """Of this process, all its threads, so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def apart(work: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a process of its own, which starts without what an earlier one has in memory."""
    return together([(work, arguments, {})])[0]


def together(works: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, str]]]) -> list[Any]:
    """Results of processes that run side by side, each with variables of its own in the environment."""
    context = multiprocessing.get_context("fork")  # nothing has run here but imports
    ends = [context.Pipe(duplex=False) for _ in works]
    crew = [context.Process(target=_work, args=(send, *work)) for (_, send), work in zip(ends, works, strict=True)]
    for process, (_, send) in zip(crew, ends, strict=True):
        process.start()
        send.close()
    try:
        return [receive.recv() for receive, _ in ends]
    except EOFError:
        sys.exit("dry_run.py: a process has failed; its own words stand above")
    finally:
        for process in crew:
            process.kill() if sys.exc_info()[0] else process.join()


def _work(send: Any, work: Callable[..., Any], arguments: tuple[Any, ...], variables: dict[str, str]) -> None:
    os.environ.update(variables)
    datasets.disable_progress_bars()
    send.send(work(*arguments))
