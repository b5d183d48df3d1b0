"""The record of one run of `reproduce.py`: made, found again, and refused beside records of other data."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from records import SettingError, environment
from studies.kept import PROGRESS
from studies.plan import TASKS, Run


def make_record(
    run: Run, told: dict[str, Any], libraries: list[ModuleType], command: str, hardware: str
) -> dict[str, Any]:
    """What the workers know of a run (`told`), and what is needed to judge it and run it again."""
    return {
        "name": run.name,
        "run": asdict(run),
        "study": run.study,
        "task": run.task,
        "base": run.base,
        "slowmo": run.slowmo,
        "exact_average": run.exact_average,
        "workers": run.workers,
        "sync_every": run.sync_every,
        "outer_lr": run.config.outer_lr,
        "outer_momentum": run.outer_momentum,
        "inner_lr": run.inner_lr,
        "inner_state": run.inner_state,
        "seed": run.seed,
        **told,
        **environment(libraries),
        "command": command,
        "hardware": hardware,
    }


def command_of(run: Run, dataset_name: str | None) -> str:
    """
    What runs this again and needs no tuning; a row of the table without slow momentum needs its pair's
    `--outer_momentum` too.
    """
    task = TASKS[run.task]
    words: dict[str, Any] = {"study": run.study, "task": run.task, "bases": run.base}
    if dataset_name:
        words["dataset_name"] = "FOLDER"
    if run.study in ("table1", "sweep"):
        words["inner_lr"] = run.inner_lr
        if run.slowmo and not (run.study == "sweep" and task.two_workers):
            words["outer_momentum"] = run.outer_momentum
    usual = {"tuning": task.tuning_epochs, "published": task.published.get("epochs")}.get(run.study)
    if run.epochs != (usual or task.sizes.get("epochs", Run.epochs)):
        words["epochs"] = run.epochs
    if run.study == "table1" and run.seed > (task.pair_seeds if run.base == "local_sgd" else task.seeds):
        words["seeds"] = run.seed
    return " ".join(["python recipes/studies/reproduce.py", *(f"--{name} {value}" for name, value in words.items())])


def outcome(record: dict[str, Any]) -> str:
    """A run in one line."""
    metrics = {name: round(value, 4) for name, value in record["metrics"].items()}
    return f"{record['name']}: {metrics}, {record['seconds']:.0f} s"


def check_same_data(data: Any, task: str, dataset_name: str | None, folder: Path) -> None:
    """
    Runs on other data than the records beside them would be compared as if they were of the same; and a run that is
    left there would be lost.
    """
    held = [(path, _read(path) or {}) for path in sorted(folder.glob(f"{task}/*/*.json"))]
    left = sorted(folder.glob(f"{task}/*/*.state/epoch*/{PROGRESS}"))
    held += [(path, (_read(path) or {}).get("run", {})) for path in left]
    for path, record in held:
        if record.get("dataset_sha256", data.sha256) != data.sha256:
            name = f"{record['dataset']!r} with " if "dataset" in record else ""
            raise SettingError(
                f"dataset_name must be what the runs in {str(folder)!r} are of, {name}SHA-256 "
                f"{record['dataset_sha256'][:12]} as in {path.relative_to(folder)}, got {dataset_name!r}, which is "
                f"{data.name!r} with {data.sha256[:12]}. Set --dataset_name, or --records to another folder."
            )


def find_record(run: Run, folder: Path) -> dict[str, Any] | None:
    """The record of this very run; None where there is none, or where it is of other settings or cannot be read."""
    record = _read(folder / f"{run.name}.json")
    return record if record and run.matches(record) else None


def _read(path: Path) -> dict[str, Any] | None:
    """A record; None where it is not there, or half written: it is run again."""
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return record
