"""What `reproduce.py` runs and where: the runs of a part of a study, their folder, their processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness import patience
from records import SettingError, write_record
from studies import reproduce
from studies.plan import Run
from studies.run_records import make_record


def test_a_sweep_of_gossip_alone_takes_what_tuning_chose(tmp_path):
    """Local SGD's rate is chosen too, though no run of it is asked for: the sweep is around its row."""
    tunes = reproduce.Arguments(study="tuning")
    for _ in ("rates", "momenta"):
        for run in reproduce.study_runs(tunes, tmp_path):
            told = make_record(run, {"metrics": {"validation_accuracy": 0.5}}, [], command="", hardware="")
            write_record(told, tmp_path / f"{run.name}.json")
    sweep = reproduce.study_runs(reproduce.Arguments(study="sweep", bases=["sgp"]), tmp_path)
    assert [(run.base, run.exact_average, run.inner_state) for run in sweep] == [
        ("sgp", True, "auto"),
        ("sgp", False, "auto"),
        ("sgp", True, "maintain"),
    ]


def test_records_go_into_a_folder(tmp_path):
    (tmp_path / "records").write_text("")
    run = Run("table1", "image_classification", "local_sgd", 0.5, 0.1, seed=3)
    for path in (tmp_path / "records", tmp_path / "records" / "more"):
        with pytest.raises(SettingError, match=rf"^records must be .*, got '{path}': .*\. Set --records\.$"):
            reproduce.run_all([run], reproduce.Arguments(), path, "cpu")


PROGRAM = """
import os, pathlib, time
from studies import reproduce

if __name__ == "__main__":
    with reproduce.pool_of(jobs=1, threads=1) as pool:
        pathlib.Path("run").write_text(str(pool.submit(os.getpid).result()) + ".")
        pool.submit(time.sleep, 600).result()
"""


@pytest.mark.slow
def test_a_run_ends_with_the_program_that_was_killed(tmp_path):
    """A killed program can tell its runs nothing; they see that it is gone."""
    (tmp_path / "program.py").write_text(PROGRAM)
    paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    found = tmp_path / "run"
    with subprocess.Popen([sys.executable, "program.py"], cwd=tmp_path, env=os.environ | paths) as program:
        wait_for(lambda: found.exists() and found.read_text().endswith("."), seconds=120)
        program.kill()
    run = int(found.read_text().removesuffix("."))
    wait_for(lambda: not is_there(run), seconds=30)


def wait_for(what, seconds):
    until = time.monotonic() + patience(seconds)
    while not what():
        assert time.monotonic() < until
        time.sleep(0.05)


def is_there(process):
    """A zombie is gone: its exit status may never be asked for."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
