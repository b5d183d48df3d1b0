"""
Ranks that live and die by themselves: no launcher that would end the survivors first. What they say is in files.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from harness import fork_server, launcher_store, patience, rank_environment, warnings_are_errors

TIMEOUT_SECONDS = patience(5)
HOST = socket.gethostname()
SIDE_BY_SIDE = 6  # tests, of two to four processes each


_here: Path | None = None


def now():
    """The time of a failure counts from here: of a rank that fails, call it where it does."""
    if _here is not None:
        _here.write_text(str(time.time()))


def _live(rank, world_size, port, store_lives_with, folder, check, args):
    """
    As a script would: an uncaught error goes through the interpreter's hook; its words and the time are left in a
    file.
    """
    torch.set_num_threads(1)
    os.environ.update(
        OMP_NUM_THREADS="1",
        ACCELERATE_USE_CPU="true",
        **rank_environment(rank, world_size),
    )
    warnings_are_errors()
    sys.excepthook = lambda kind, error, trace: (
        Path(folder, f"{rank}.told").write_text(f"{kind.__name__}: {error}") and None
    )
    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=rank == store_lives_with, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    global _here
    _here = Path(folder, f"{rank}.here")
    now()
    try:
        check(rank, *args)
    except StopIteration:
        time.sleep(TIMEOUT_SECONDS + 30)  # its training is over, and its process goes on to something else
    except SystemExit:
        pass
    except BaseException:
        sys.excepthook(*sys.exc_info())
    from slowmo_hf.wire.roll_call import _at_exit  # multiprocessing's children skip atexit

    _at_exit()
    os._exit(0)


def run_apart(check, *args, world_size=2, survivors=(0,), store_lives_with=None):
    """
    What every survivor said, and the seconds until the last of them had ended: from when all ranks were there, or from
    the last `now()`. The store is here, as in a launcher, or a rank's.
    """
    store = launcher_store(world_size)
    port = store.port
    if store_lives_with is not None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            fork_server().Process(
                target=_live, args=(rank, world_size, port, store_lives_with, folder, check, args), daemon=True
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for rank in survivors:
            processes[rank].join(timeout=patience(60))
        end = time.time()
        alive = [rank for rank in survivors if processes[rank].is_alive()]
        for process in processes:
            process.kill()
            process.join()
        assert not alive, f"ranks {alive} hang"
        began = max(float(Path(folder, f"{rank}.here").read_text()) for rank in range(world_size))
        told = [Path(folder, f"{rank}.told") for rank in survivors]
        return [path.read_text() if path.exists() else "" for path in told], end - began
