"""
All that wants a CUDA device, in one command that ends in time and goes on where it stopped:

    python benchmarks/gpu.py --minutes 9        (`make gpu ARGS="--minutes 9"`)

A slice is one program. It leaves one record, `benchmarks/records/gpu/NAME.json`, and the records are all that is
remembered: a slice whose record is of the same sources and the same device is not run again (`--again NAME` does). A
slice that would not end in the minutes left is not started; one that fails is recorded with the end of what it
printed, and the next one runs. The most telling come first. Exit code 1: the record of a slice says "failed".

`--device cpu` is a dry run with tiny sizes, of the same programs: its figures mean nothing.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from measuring import arguments_of, device_facts, hardware
from records import environment, write_record

ROOT = Path(__file__).parents[1]
OUTPUT = {"cuda": "benchmarks/records/gpu", "cpu": "outputs/gpu_dry_run"}
IMAGES = ("shared/data/cifar10", "../shared/data/cifar10")  # where a folder of CIFAR-10 is looked for
TAIL = 6000  # characters of a program's output that a record keeps
STUDY_SECONDS = 120  # less is not worth a start


@dataclass
class GpuArguments:
    """What to run, where, and for how long."""

    minutes: float = field(default=9.0, metadata={"help": "Start nothing that would end later."})
    device: str = field(
        default="cuda", metadata={"help": "cuda, or cpu: a dry run with tiny sizes.", "choices": ["cuda", "cpu"]}
    )
    output: str | None = field(
        default=None,
        metadata={"help": f"Folder of the records; by default {OUTPUT['cuda']}, of a dry run {OUTPUT['cpu']}."},
    )
    only: str | None = field(default=None, metadata={"help": "This slice alone."})
    again: str | None = field(default=None, metadata={"help": "Run this slice though its record is there."})
    commit: str | None = field(
        default=None, metadata={"help": "For the records, of a copy without git: the commit that it is of."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": f"Folder of CIFAR-10 for the study; by default one of {', '.join(IMAGES)}."}
    )


@dataclass(frozen=True)
class Slice:
    """
    One program.

    Args:
        name (`str`): Also its record's file name.
        says (`str`): What is learned of it.
        command (`tuple[str, ...]`): What follows "python"; `{figures}` stands for the file that figures are written
            to, `{minutes}` for the time left.
        seconds (`float`): Roughly what it takes.
        needs (`tuple[str, ...]`, *optional*): Packages.
        sources (`tuple[str, ...]`, *optional*): Files, as patterns, that its result depends on beside the package.
        figures (`str`, *optional*, defaults to `"figures.json"`): JSON, or pytest's XML.
        goes_on (`bool`, *optional*): The program itself knows what it has done: it is called again for the time left.
        why_not (`Callable`, *optional*): Why it cannot run here, or None.
    """

    name: str
    says: str
    command: tuple[str, ...]
    seconds: float
    needs: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    figures: str = "figures.json"
    goes_on: bool = False
    why_not: Callable[[], str | None] = lambda: None


# ---- the slices ----


def slices(device: str, dataset_name: str | None) -> list[Slice]:
    """All, the most telling first."""
    found = [
        checks("trainer", "fp16 and bf16 under Trainer, NCCL, two ranks on a card, gossip", "test_cuda.py", device),
        checks("values", "what the card computes is what the CPU does; resume", "test_cuda_values.py", device),
        checks("memory", "bytes on the card against the documented ones", "test_cuda_memory.py", device),
        costs("arithmetic", "lines 7 and 8 against their bytes, T5-small", device, "--processes 1 --parts arithmetic"),
        checks(
            "sharded",
            "FSDP2 in a world of one over NCCL, main memory beside the card, resume: the plain model's values",
            "test_cuda_sharded.py test_cuda_sharded_programs.py",
            device,
            seconds={"cuda": 420, "cpu": 120},  # 350 beside three other slices were not enough
            others=("tests/cuda_shards.py", "tests/fsdp.py", "benchmarks/measuring.py"),
        ),
        costs("overlap", "a step with an overlapped round, two ranks on a card", device, f"--parts overlap {STEP}"),
        costs("overlap_alone", "the same without a message", device, f"--processes 1 --parts overlap {STEP}"),
        costs(
            "arithmetic_large",
            "lines 7 and 8 against their bytes, a T5 of 24 layers of width 1024",
            device,
            "--processes 1 --parts arithmetic --d_model 1024 --layers 24",
        ),
    ]
    return [*found, study(dataset_name)] if device == "cuda" else found


STEP = "--step_width 512 --step_tokens 16384"
TINY = "--repeats 3 --d_model 32 --layers 1 --vocab_size 64 --step_width 16 --step_tokens 64 --copy_bytes 1000000"


SECONDS = {"cuda": 120, "cpu": 20}


def checks(
    name: str, says: str, files: str, device: str, seconds: dict[str, float] = SECONDS, others: tuple[str, ...] = ()
) -> Slice:
    """Files of tests: those that need a card, or those that do not. `others` are more sources."""
    marked = "cuda" if device == "cuda" else "not cuda"
    tests = [f"tests/{file}" for file in files.split()]
    return Slice(
        name,
        says,
        ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marked, *tests, "--junitxml={figures}"),
        seconds=seconds[device],
        needs=("pytest", "pytest_timeout"),
        sources=(
            *tests,
            "tests/devices.py",
            "tests/memory.py",
            "tests/harness.py",
            "tests/tiny.py",
            "tests/conftest.py",
            *others,
        ),
        figures="figures.xml",
    )


def costs(name: str, says: str, device: str, flags: str) -> Slice:
    """A part of `round_cost.py`."""
    sizes = f"{flags} {TINY}" if device == "cpu" else flags
    command = ("benchmarks/round_cost.py", "--device", device, *shlex.split(sizes), "--output", "{figures}")
    files = ("round_cost.py", "round_parts.py", "on_device.py", "measuring.py")
    return Slice(
        name,
        says,
        command,
        seconds=90 if device == "cuda" else 15,
        sources=tuple(f"benchmarks/{file}" for file in files),
    )


def study(dataset_name: str | None) -> Slice:
    """The paper's comparison on CIFAR-10, for the time left; the program keeps its own records and goes on."""
    folders = [folder for folder in ([dataset_name] if dataset_name else IMAGES) if (ROOT / folder).is_dir()]
    program = "recipes/studies/reproduce.py"

    def why_not() -> str | None:
        if not folders:
            return f"no folder of CIFAR-10 at {dataset_name or ' or '.join(IMAGES)}: name one with --dataset_name"
        told = subprocess.run([sys.executable, program, "--help"], cwd=ROOT, capture_output=True, text=True)
        return f"{program} does not start: {_last_line(told.stderr)}" if told.returncode else None

    return Slice(
        "study",
        "the paper's comparison on CIFAR-10",
        (program, "--scale", "gpu", "--minutes", "{minutes}", "--dataset_name", *folders[:1]),
        seconds=STUDY_SECONDS,
        sources=("recipes/**/*.py",),
        goes_on=True,
        why_not=why_not,
    )


# ---- records ----


class Records:
    """
    One file per slice in `folder`.

    Args:
        folder (`Path`): Made with the first record.
        device (`dict`): Of this run: a record of another one does not count.
        commit (`str`, *optional*): In place of what git says.
    """

    def __init__(self, folder: Path, device: dict[str, Any], commit: str | None = None) -> None:
        self.folder, self.device = folder, device
        self.environment = environment([]) | ({"commit": commit} if commit else {})

    def current(self, slice_: Slice) -> dict[str, Any] | None:
        """The slice's record, where it is of these sources and this device."""
        path = self.folder / f"{slice_.name}.json"
        record = json.loads(path.read_text()) if path.exists() else {}
        if record.get("device") != self.device or record.get("sources") != digest(slice_):
            return None
        return record  # type: ignore[no-any-return]

    def write(self, slice_: Slice, state: str, **entries: Any) -> None:
        """Replace the slice's record."""
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        record = {
            "slice": slice_.name,
            "says": slice_.says,
            "state": state,
            "command": shlex.join(["python", *slice_.command]),
            "date": date,
            "device": self.device,
            **self.environment,
            "hardware": hardware(),
            "sources": digest(slice_),
            **entries,
        }
        write_record(record, self.folder / f"{slice_.name}.json")


def digest(slice_: Slice) -> str:
    """Of the package's sources and the slice's own: a commit that changes none of them leaves its record valid."""
    found = hashlib.sha256(shlex.join(slice_.command).encode())
    for pattern in ("src/**/*.py", *slice_.sources):
        for path in sorted(ROOT.glob(pattern)):
            found.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return found.hexdigest()


# ---- running ----


def run_slices(
    chosen: list[Slice], records: Records, minutes: float, again: str | None = None
) -> dict[str, tuple[str, str]]:
    """Run what is not there yet, in order, for so long; {name: (state, words)}."""
    deadline = time.monotonic() + 60 * minutes
    states = {}
    for slice_ in chosen:
        print(f"{slice_.name}: ", end="", flush=True)
        states[slice_.name] = state, words = _take(slice_, records, deadline, slice_.name == again)
        print(f"{state}{', ' if words else ''}{words}", flush=True)
    return states


def _take(slice_: Slice, records: Records, deadline: float, again: bool) -> tuple[str, str]:
    record = records.current(slice_)
    kept = record is not None and record["state"] in ("done", "failed") and not slice_.goes_on and not again
    if record is not None and kept:
        return record["state"], f"on {record['date']}; --again {slice_.name} repeats it"
    missing = [package for package in slice_.needs if importlib.util.find_spec(package) is None]
    why = f"package {' and '.join(missing)} is missing" if missing else slice_.why_not()
    if why:
        records.write(slice_, "not run", why=why)
        return "not run", why
    left = deadline - time.monotonic()
    wanted = max(slice_.seconds, record["seconds"] + 1 if record is not None and record["state"] == "stopped" else 0)
    if left < wanted:
        return "left", f"takes about {wanted:.0f} s, {max(0, left):.0f} s are left"
    return _run(slice_, records, left)


def _run(slice_: Slice, records: Records, left: float) -> tuple[str, str]:
    """Start the program, wait for it, and write what came of it; it is ended when the time is over."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder, slice_.figures)
        places = {"{figures}": str(figures), "{minutes}": f"{left / 60 - 0.5:.1f}"}
        command = [sys.executable, *slice_.command]
        for name, value in places.items():
            command = [word.replace(name, value) for word in command]
        code, output = _wait(command, Path(folder, "output"), left)
        seconds = round(time.perf_counter() - start, 1)
        read = _read(figures) if figures.exists() else None
    entries = {"seconds": seconds, "exit_code": code, "figures": read}
    if code == 0:
        records.write(slice_, "done", **entries)
        return "done", "; ".join([f"{seconds:.0f} s", *targets(read)])
    state = "stopped" if code is None else "failed"
    records.write(slice_, state, **entries, output_tail=output[-TAIL:])
    why = "the minutes were over" if code is None else f"exit code {code}: {_last_line(output)}"
    return state, f"{seconds:.0f} s, {why}"


def _wait(command: list[str], printed: Path, seconds: float) -> tuple[int | None, str]:
    """Exit code and output of a program; no code where it was ended, with all that it had started."""
    paths = [str(ROOT / "src"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    with printed.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environ, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return code, printed.read_text(errors="replace").replace(f"{ROOT}/", "")


def _read(figures: Path) -> Any:
    """A JSON file as it is; of pytest's XML every test with its seconds and how it ended."""
    if figures.suffix == ".json":
        return json.loads(figures.read_text())
    cases = ElementTree.parse(figures).iter("testcase")
    return {
        case.get("name"): {
            "seconds": float(case.get("time", 0)),
            "ended": next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed"),
        }
        for case in cases
    }


def _last_line(output: str) -> str:
    return next((line.strip()[:160] for line in reversed(output.splitlines()) if line.strip()), "it printed nothing")


def targets(figures: Any) -> list[str]:
    """Every ratio that has a target, in words."""
    if not isinstance(figures, dict):
        return []
    own = [
        f"{name} {entry['ratio']} ({entry['target']}, {'met' if entry['met'] else 'missed'})"
        for name, entry in figures.items()
        if isinstance(entry, dict) and "target" in entry and "ratio" in entry
    ]
    return own + [words for entry in figures.values() for words in targets(entry)]


# ---- the command ----


def table(states: dict[str, tuple[str, str]]) -> str:
    """Who is done, who failed, who is left."""
    kinds = {"done": ["done"], "failed": ["failed"], "not run": ["not run"], "left": ["left", "stopped"]}
    rows = {kind: [name for name, (state, _) in states.items() if state in own] for kind, own in kinds.items()}
    return "\n".join(f"{kind:<8} {len(names)}  {', '.join(names)}" for kind, names in rows.items())


def choose(found: list[Slice], only: str | None, again: str | None) -> list[Slice]:
    """All, or the one that is asked for."""
    names = [slice_.name for slice_ in found]
    for flag, name in (("only", only), ("again", again)):
        if name is not None and name not in names:
            raise ValueError(f"{flag} must be one of {', '.join(names)}, got {name!r}.")
    return [slice_ for slice_ in found if only in (None, slice_.name)]


def main() -> None:
    """Run for the minutes that are given; the exit code says whether a slice failed."""
    args = arguments_of(GpuArguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            f"gpu.py: device='cuda' needs a CUDA device, and torch {torch.__version__} finds none. --device cpu is a "
            "dry run with tiny sizes."
        )
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that a program is ended too
    try:
        chosen = choose(slices(args.device, args.dataset_name), args.only, args.again)
    except ValueError as error:
        sys.exit(f"gpu.py: {error}")
    records = Records(ROOT / (args.output or OUTPUT[args.device]), device_facts(args.device), args.commit)
    states = run_slices(chosen, records, args.minutes, args.again)
    print(f"\n{table(states)}\nrecords in {records.folder}")
    sys.exit(any(state == "failed" for state, _ in states.values()))


if __name__ == "__main__":
    main()
