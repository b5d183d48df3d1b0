"""
Runs a script unchanged, notes the moments that each process passes through, and kills the process (SIGKILL) at chosen
ones.

    accelerate launch ... benchmarks/kill_switch.py recipes/image/train.py --output_dir ...

The launcher runs it in the script's place; `benchmarks/kill.py` and `tests/test_kill.py` do so. It reads three
environment variables:

    KILL_NOTES    a folder: every process of every attempt appends JSON lines to a file of its own there
    KILL_WATCHED  the run's output folder: what happens to files in it is a moment
    KILL_PLAN     a JSON list of kills: {"attempt": 0, "rank": 1, "kind": "our file", "nth": 3, "delay_ms": null}

A note is `["weights", sha256]`, the process's own parameters (its shards, where they are sharded) and buffers as a
training step begins with them, `["moment", kind, words]`, or `["kill", kind, words]`, the last one of a process that
is killed there. With `delay_ms` a process outside sends the signal so much later, wherever this one is then, be it in
the middle of a write, of arithmetic or of a message.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import runpy
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from slowmo_hf.dtensors import local

START, RESUME, FORWARD, BACKWARD, INNER_STEP = "start", "resume", "forward", "backward", "inner step"
MESSAGE, EVALUATION, OUR_FILE, THEIR_FILE, SEAL, ROTATION, END = (
    *("message", "evaluation", "our file", "their file", "seal", "rotation", "end"),
)
KINDS = (START, RESUME, FORWARD, BACKWARD, INNER_STEP, MESSAGE, EVALUATION, OUR_FILE, THEIR_FILE, SEAL, ROTATION, END)
# Of `Communicator`: who takes one of these away has to say here what workers send instead.
LASTING = ("start_sum_", "gather_header", "gather_objects", "exchange", "finish")


class Switch:
    """One process's notes, and its kill."""

    def __init__(self, notes: Path, watched: Path, plan: list[dict[str, Any]]) -> None:
        self.rank, self.attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        self.watched = watched.resolve()
        self._notes = (notes / f"attempt_{self.attempt}_rank_{self.rank}.jsonl").open("a", buffering=1)
        self._plan = [kill for kill in plan if (kill["attempt"], kill["rank"]) == (self.attempt, self.rank)]
        self._seen: Counter[str] = Counter()
        self.model: torch.nn.Module | None = None  # when training has begun
        self._busy = False

    def note(self, *words: str) -> None:
        """One line, whole or absent: it is in the kernel's hands before the process goes on."""
        self._notes.write(json.dumps(words) + "\n")

    def moment(self, kind: str, words: str, torn: Path | None = None) -> None:
        """
        Note a moment, and die if it is the planned one. Before the first training step all are the start's, or a
        resume's.

        Args:
            torn (`Path`, *optional*): A file that has just been written; who dies here leaves the first half of it.
        """
        kind = kind if self.model is not None else RESUME if self.attempt else START
        nth = self._seen[kind]
        self._seen[kind] += 1
        kill = next((kill for kill in self._plan if (kill["kind"], kill["nth"]) == (kind, nth)), None)
        if kill is None:
            self.note("moment", kind, words)
            return
        self.note("kill", kind, words)
        if kill["delay_ms"] is not None:
            subprocess.Popen(["sh", "-c", f"sleep {kill['delay_ms'] / 1000}; kill -9 {os.getpid()}"], close_fds=False)
            return
        if torn is not None:
            os.truncate(torn, torn.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    def before_step(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """
        Note the local weights that a training step begins with: within the wrapper's forward, when all hooks have run
        and DDP has given the buffers of a worker's first process to the others, which a resume may leave apart.
        """

        def watched_forward(wrapper: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():

                def begin(module: torch.nn.Module, inputs: Any) -> None:
                    once.remove()
                    self.begin_step(module)

                once = wrapper.module.register_forward_pre_hook(begin)  # the last of its hooks
            return forward(wrapper, *args, **kwargs)

        return watched_forward

    def before_sharded_step(self, pre_forward: Callable[..., Any]) -> Callable[..., Any]:
        """
        The same where there is no wrapper, in the hook of FSDP's that every sharded module's forward begins with: that
        of the outermost gathers nothing yet, and hooks that are called for all modules have run.
        """

        def watched_pre_forward(state: Any, module: torch.nn.Module, *args: Any) -> Any:
            is_inside = state._state_ctx.iter_forward_root is not None  # until the first forward all have their own
            if torch.is_grad_enabled() and not is_inside:
                self.begin_step(module)
            return pre_forward(state, module, *args)

        return watched_pre_forward

    def begin_step(self, module: torch.nn.Module) -> None:
        """Note the weights, and a moment."""
        self.note("weights", _digest(module))
        self.model = module
        self.moment(FORWARD, "a step begins")

    # ---- files ----

    def file_event(self, event: str, args: tuple[Any, ...]) -> None:
        """An audit hook: Python tells what it is about to do with a file."""
        if self._busy or event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"):
            return
        self._busy = True
        try:
            path = _path_of(event, args)
            if path is not None and path.is_relative_to(self.watched):
                self.moment(self._kind_of(path, event, args), f"{event} {path.relative_to(self.watched)}")
        finally:
            self._busy = False

    def _kind_of(self, path: Path, event: str = "", args: tuple[Any, ...] = ()) -> str:
        parts = path.relative_to(self.watched).parts
        is_folder = len(parts) == 1 and not path.suffix
        # rmtree works from descriptors.
        if event in ("shutil.rmtree", "os.rmdir") or (event == "os.remove" and args[1] != -1):
            return ROTATION
        if is_folder and event in ("open", "os.rename"):  # a checkpoint on its way out
            return ROTATION
        if path.name.startswith("manifest.json"):
            return SEAL
        if not parts or (len(parts) == 1 and not is_folder):
            return END
        return OUR_FILE if "slowmo" in parts or path.name == ".slowmo-saving" else THEIR_FILE

    def around_write(self, write: Callable[..., Any]) -> Callable[..., Any]:
        """
        `write(what, path)`: moments before, half-way and after. C++ and Rust open files unseen by the audit hook.
        """

        def watched_write(what: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
            target = Path(path).resolve() if isinstance(path, str | os.PathLike) else None
            if target is None or not target.is_relative_to(self.watched):
                return write(what, path, *args, **kwargs)
            words = str(target.relative_to(self.watched))
            self.moment(self._kind_of(target), f"to write {words}")
            result = write(what, path, *args, **kwargs)
            self.moment(self._kind_of(target), f"half of {words}", torn=target)
            self.moment(self._kind_of(target), f"has written {words}")
            return result

        return watched_write

    def around_stream(self, create_stream: Callable[..., Any]) -> Callable[..., Any]:
        """What opens a file of a sharded save (DCP): moments when it has been written, half-way and after."""

        @contextmanager
        def watched_stream(system: Any, path: Any, mode: str) -> Iterator[Any]:
            with create_stream(system, path, mode) as stream:
                yield stream
            target = Path(path).resolve()
            if "w" in mode and target.is_relative_to(self.watched):
                words = str(target.relative_to(self.watched))
                self.moment(self._kind_of(target), f"half of {words}", torn=target)
                self.moment(self._kind_of(target), f"has written {words}")

        return watched_stream

    def around(self, kind: str, act: Callable[..., Any]) -> Callable[..., Any]:
        """Moments before and after a call."""

        def watched_act(*args: Any, **kwargs: Any) -> Any:
            self.moment(kind, f"to {act.__name__}")
            result = act(*args, **kwargs)
            self.moment(kind, f"after {act.__name__}")
            return result

        return watched_act


def _digest(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(local(value).detach().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _path_of(event: str, args: tuple[Any, ...]) -> Path | None:
    """The file that an audit event is about; None where it has no path."""
    if not isinstance(args[0], str | os.PathLike):
        return None
    directory = args[-1] if event in ("os.remove", "os.rmdir") and args[-1] not in (-1, None) else None
    return Path(os.path.abspath(os.path.join(os.readlink(f"/proc/self/fd/{directory}") if directory else "", args[0])))


def messages_of(communicator: type) -> list[str]:
    """
    Every public method of a communicator's own, which all send something, and the peer-to-peer messages that it
    inherits.

    Raises:
        AttributeError: One of `LASTING` is gone: less would be killed than the record says.
    """
    gone = [name for name in LASTING if not inspect.isfunction(getattr(communicator, name, None))]
    if gone:
        raise AttributeError(
            f"LASTING in benchmarks/kill_switch.py names {', '.join(gone)}, which {communicator.__name__} no longer "
            "has. Name what is sent in its place."
        )
    own = [name for name, value in vars(communicator).items() if inspect.isfunction(value) and name[0] != "_"]
    return [*own, *(name for name in LASTING if name not in own)]


def install(switch: Switch) -> None:
    """Watch files first: the libraries take their functions for writing when they are imported."""
    torch.save = switch.around_write(torch.save)
    safetensors.torch.save_file = switch.around_write(safetensors.torch.save_file)
    sys.addaudithook(switch.file_event)

    from accelerate import Accelerator
    from torch.nn.parallel import DistributedDataParallel

    from slowmo_hf.wire.communicator import Communicator

    def before_forward(module: torch.nn.Module, args: Any) -> None:
        if module is switch.model and not torch.is_grad_enabled():
            switch.moment(EVALUATION, "a batch begins")

    register_module_forward_pre_hook(before_forward)
    DistributedDataParallel.forward = switch.before_step(DistributedDataParallel.forward)
    register_optimizer_step_pre_hook(lambda *_: switch.moment(INNER_STEP, "to step"))
    register_optimizer_step_post_hook(lambda *_: switch.moment(INNER_STEP, "after step"))
    Accelerator.backward = switch.around(BACKWARD, Accelerator.backward)
    for name in messages_of(Communicator):
        setattr(Communicator, name, switch.around(MESSAGE, getattr(Communicator, name)))


def install_for_shards(switch: Switch) -> None:
    """What only sharded models pass through; other jobs need not wait for these imports."""
    from torch.distributed.checkpoint.filesystem import FileSystem
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

    FSDPState._root_pre_forward = switch.before_sharded_step(FSDPState._root_pre_forward)
    FileSystem.create_stream = switch.around_stream(FileSystem.create_stream)


def main() -> None:
    """Install the switch, and run the script as the launcher would have."""
    notes, watched, plan = (os.environ[name] for name in ("KILL_NOTES", "KILL_WATCHED", "KILL_PLAN"))
    switch = Switch(Path(notes), Path(watched), json.loads(plan))
    install(switch)
    if "--shards" in sys.argv:
        install_for_shards(switch)
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
