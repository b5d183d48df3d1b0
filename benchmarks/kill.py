"""
Kills runs with SIGKILL at random moments, lets the launcher start them again, and compares every rank's weights, bit
for bit, with a run that was never killed.

    python benchmarks/kill.py --points 200 --seed 0
    python benchmarks/kill.py --points 120 --processes_per_worker 2 --shards 2 --ten_kills 0 --output
    benchmarks/records/kills_node_workers.json

The second kills workers of two processes, of two kinds: each process has the whole model (DDP), or a shard of it
(FSDP2).

A point is one launch of a real job, `recipes/image/train.py` (Trainer; sharded, `benchmarks/kill_trainer.py`) or
`benchmarks/kill_accelerate.py` (a custom loop), under `accelerate launch --max_restarts`, with one kill, or two where
the second meets the resume. Moments are drawn from the list of those that the uninterrupted run of the same job passed
through (`benchmarks/kill_switch.py`). The record is written after every point, and the same command goes on where it
was stopped.
"""

from __future__ import annotations

import importlib
import itertools
import json
import random
import shutil
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kill_jobs import JOBS, JOBS_OF, longer
from kill_runs import (
    ROOT,
    Job,
    Kill,
    Launcher,
    Run,
    accelerate_launch,
    differences,
    first_steps,
    launch,
    met,
)
from measuring import arguments_of, check_at_least, origin
from records import commit, end_program, write_record

# ---- random moments ----

STEP_KINDS = ("forward", "backward", "inner step")
STRATA = {
    "in a step": STEP_KINDS,
    "in a message": ("message",),
    "our files": ("our file",),
    "the library's files": ("their file",),
    "the seal": ("seal",),
    "deletion of an old checkpoint": ("rotation",),
    "evaluation": ("evaluation",),
    "the start": ("start",),
    "before the first save": (*STEP_KINDS, "message", "evaluation"),
    "after the last step": ("end",),
    "any instant": (*STEP_KINDS, "message", "our file", "their file", "seal", "rotation", "evaluation"),
    "the resume": (*STEP_KINDS, "message", "our file", "their file", "seal"),
}
# In any four steps.
MIDWAY = (
    "in a step",
    "in a message",
    "our files",
    "the library's files",
    "the seal",
    "evaluation",
    "any instant",
)
MAX_DELAY_MS = 30.0


def moments(run: Run, rank: int) -> list[tuple[str, int]]:
    """Every moment of a rank's first attempt in order: its kind, and which of its kind it is."""
    kinds = [note[1] for note in run.notes[0, rank] if note[0] == "moment"]
    seen: Counter[str] = Counter()
    found = []
    for kind in kinds:
        found.append((kind, seen[kind]))
        seen[kind] += 1
    return found


def draw(stratum: str, reference: Run, resume_moments: list[int], chance: random.Random) -> tuple[Kill, ...]:
    """
    One point's kills; where the resume is to be killed too, an attempt that got beyond the first save comes before.
    """
    first = _draw_one(0, stratum, {rank: moments(reference, rank) for rank in reference.ranks}, chance)
    return (first, _draw_resume(1, resume_moments, chance)) if stratum == "the resume" else (first,)


def draw_many(
    strata: Iterable[str], reference: Run, resume_moments: list[int], chance: random.Random
) -> tuple[Kill, ...]:
    """A kill in every attempt, within its first four steps or in its resume."""
    early = {
        rank: found[: found.index(("forward", 4))] for rank in reference.ranks if (found := moments(reference, rank))
    }
    return tuple(
        _draw_resume(attempt, resume_moments, chance)
        if stratum == "the resume"
        else _draw_one(attempt, stratum, early, chance)
        for attempt, stratum in enumerate(strata)
    )


def _draw_one(attempt: int, stratum: str, found: dict[int, list[tuple[str, int]]], chance: random.Random) -> Kill:
    """At one of these moments, by rank, that are of the stratum."""
    if stratum == "before the first save":
        found = {
            rank: list(itertools.takewhile(lambda moment: "file" not in moment[0], all_of_it))
            for rank, all_of_it in found.items()
        }
    candidates = {
        rank: [moment for moment in all_of_it if moment[0] in STRATA[stratum]] for rank, all_of_it in found.items()
    }
    rank = chance.choice([rank for rank, left in candidates.items() if left])
    delay_ms = round(chance.uniform(0, MAX_DELAY_MS), 1) if stratum == "any instant" else None
    return Kill(attempt, rank, *chance.choice(candidates[rank]), delay_ms=delay_ms)


def _draw_resume(attempt: int, resume_moments: list[int], chance: random.Random) -> Kill:
    rank = chance.randrange(len(resume_moments))
    return Kill(attempt, rank, "resume", chance.randrange(resume_moments[rank]))


def resume_moments(run: Run) -> list[int]:
    """How many moments every rank's last attempt passed through before its first training step."""
    last = [notes for (attempt, _), notes in sorted(run.notes.items()) if attempt == run.attempts - 1]
    return [sum(note[0] == "moment" and note[1] == "resume" for note in notes) for notes in last]


# ---- the record ----


@dataclass
class KillArguments:
    """How many, and where."""

    points: int = field(default=200, metadata={"help": "Points, each a launch with one random kill, or two."})
    ten_kills: int = field(default=4, metadata={"help": "Launches with ten random kills each."})
    seed: int = field(default=0, metadata={"help": "Of the moments."})
    processes_per_worker: int = field(
        default=1, metadata={"help": "2 for two workers of two processes each; 1 for workers of one."}
    )
    shards: int = field(
        default=1,
        metadata={"help": "2 for workers of two processes that shard their model, beside the others where there are."},
    )
    forked: bool = field(
        default=False,
        metadata={
            "help": "Start processes by tests/launcher.py, from a server that has imported torch, and not by "
            "accelerate launch: several times as fast. Every point says which."
        },
    )
    output: str = field(
        default="benchmarks/records/kills.json", metadata={"help": "The record; one of the same seed is gone on with."}
    )
    folder: str = field(
        default="outputs/kills", metadata={"help": "Runs are made here; those that differ are left here."}
    )

    def __post_init__(self) -> None:
        for name in ("processes_per_worker", "shards"):
            if getattr(self, name) not in (1, 2):
                raise ValueError(f"{name} must be 1 or 2, got {getattr(self, name)}. Set --{name}.")
        check_at_least(0, self, "points", "ten_kills")

    @property
    def launcher(self) -> Launcher:
        """What starts the processes, and starts them again."""
        if not self.forked:
            return accelerate_launch
        sys.path.append(str(ROOT / "tests"))
        return importlib.import_module("launcher").launch

    @property
    def jobs(self) -> dict[str, Job]:
        """What is killed, by name."""
        return JOBS_OF[self.processes_per_worker, self.shards]


class Record:
    """
    What has been measured: written after every launch, beside and renamed.

    Args:
        args (`KillArguments`): A record of another seed, or of other jobs, at `output` is refused.
    """

    def __init__(self, args: KillArguments) -> None:
        self.args, self.path = args, Path(args.output)
        self.references: dict[str, Run] = {}
        self.values: dict[str, Any] = {"seed": args.seed, "points": [], "ten_kills": [], "resume_moments": {}}
        if self.path.exists():
            self.values = json.loads(self.path.read_text())
        if self.values["seed"] != args.seed:
            raise ValueError(
                f"seed must be {self.values['seed']}, that of {self.path}, got {args.seed}. Set --seed, or another "
                "--output."
            )
        jobs = {name: asdict(job) for name, job in args.jobs.items()}
        if set(self.values.get("jobs", jobs)) != set(jobs):
            raise ValueError(
                f"processes_per_worker and shards must be those of {self.path}, whose jobs are others, got "
                f"{args.processes_per_worker} and {args.shards}. Set them, or another --output."
            )
        self.values |= {**origin(), "jobs": jobs}

    def reference(self, name: str, job: Job) -> Run:
        """The job's run that is never killed, made once."""
        if name not in self.references:
            folder = Path(self.args.folder).resolve() / f"never killed, {name}".replace(" ", "_")
            run = launch(job, folder, launcher=self.args.launcher)
            if run.exit_code:
                raise RuntimeError(f"{name} fails without a kill, exit code {run.exit_code}: {run.said[-4000:]}")
            self.references[name] = run
        return self.references[name]

    def resume_moments(self, name: str) -> list[int]:
        """Of the job's last resume; where none has been seen, of one that is made for it."""
        known = self.values["resume_moments"]
        if name not in known:
            job = self.args.jobs[name]
            kill = draw("in a step", self.reference(name, job), [], random.Random(self.args.seed))
            known[name] = resume_moments(
                launch(job, Path(self.args.folder).resolve() / "rehearsal", kill, self.args.launcher)
            )
        return known[name]

    def add(self, part: str, name: str, job: Job, kills: tuple[Kill, ...], **words: str) -> bool:
        """
        Launch, compare, write down, say in one line. False where a kill's moment never came and nothing differs: it is
        no point, and only counted (two processes that make one folder do not always both do).
        """
        reference = self.reference(name, job)
        folder = Path(self.args.folder).resolve() / f"{part}_{len(self.values[part])}"
        run = launch(job, folder, kills, self.args.launcher)
        reached = tuple(kill for kill in kills if met(run, kill) is not None)
        told = differences(reference, run, reached)
        if reached != kills and not told:
            self.values["never_reached"] = self.values.get("never_reached", 0) + 1
            return False
        self.values[part].append(
            {
                "job": name,
                **words,
                "launcher": "forked" if self.args.forked else "accelerate launch",
                "kills": [{**asdict(kill), "met": met(run, kill)} for kill in kills],
                "first_steps": first_steps(reference, run),
                "seconds": round(run.seconds, 1),
                "differences": told,
                "commit": commit(),
            }
        )
        if not told:
            shutil.rmtree(folder)
            if part == "points":
                self.values["resume_moments"][name] = resume_moments(run)
        write_record(self.values, self.path)
        where = [met(run, kill) for kill in kills]
        print(
            f"{part} {len(self.values[part])}: {name}, {words or ''} {where}: {told or 'the same'}, "
            f"{run.seconds:.0f} s",
            flush=True,
        )
        return True


def plan(points: int, seed: int, jobs: Iterable[str] = JOBS) -> list[tuple[str, str]]:
    """
    Job and stratum of every point: all pairs in a random order, and again. Resumes last: a job's other points tell how
    long its is.
    """
    pairs = list(itertools.product(jobs, STRATA))
    random.Random(seed).shuffle(pairs)
    return sorted(itertools.islice(itertools.cycle(pairs), points), key=lambda pair: pair[1] == "the resume")


def kind_of(name: str) -> str:
    """A job's kind of workers, by its name."""
    last = name.removesuffix(", longer").rpartition(", ")[2]
    return last if " x " in last else "workers of one"


def table(values: dict[str, Any]) -> str:
    """Points by kind and stratum, and how many of them ended with the weights of the run never killed."""
    all_points = [*values["points"], *values["ten_kills"]]
    several_kinds = len({kind_of(point["job"]) for point in all_points}) > 1
    rows = []
    for point in all_points:
        stratum = point.get("stratum", "ten kills in one job")
        rows.append((f"{kind_of(point['job'])}, {stratum}" if several_kinds else stratum, point))
    if several_kinds:
        rows.sort(key=lambda row: row[0])
    points = Counter(stratum for stratum, _ in rows)
    same = Counter(stratum for stratum, point in rows if not point["differences"])
    cells = [("", "points", "same"), *((stratum, number, same[stratum]) for stratum, number in points.items())]
    return "\n".join(
        f"{name:<50}{number:>8}{good:>8}" for name, number, good in [*cells, ("all", points.total(), same.total())]
    )


def main() -> None:
    """Make the points that the record does not have yet."""
    args = arguments_of(KillArguments)
    try:
        record, jobs = Record(args), args.jobs
    except ValueError as error:
        end_program(__file__, error)
    for index, (name, stratum) in enumerate(plan(args.points, args.seed, jobs)):
        if index >= len(record.values["points"]):
            chance = random.Random(f"{args.seed} {index}")
            resumes = record.resume_moments(name) if stratum == "the resume" else []
            reference = record.reference(name, jobs[name])
            while not record.add(
                "points", name, jobs[name], draw(stratum, reference, resumes, chance), stratum=stratum
            ):
                pass
    for index in range(len(record.values["ten_kills"]), args.ten_kills):
        surface = ("Trainer", "Accelerate")[index % 2]  # in turn, base by base
        name = [name for name in jobs if name.startswith(surface)][index // 2]
        job = longer(name, jobs[name])
        reference = record.reference(f"{name}, longer", job)
        chance = random.Random(f"{args.seed} ten kills {index}")
        strata = [chance.choice(MIDWAY), *chance.choices((*MIDWAY, "the resume"), k=9)]
        while not record.add(
            "ten_kills", f"{name}, longer", job, draw_many(strata, reference, record.resume_moments(name), chance)
        ):
            pass
    print(table(record.values))
    sys.exit(any(point["differences"] for part in ("points", "ten_kills") for point in record.values[part]))


if __name__ == "__main__":
    main()
