"""Programs of the studies and the benchmarks end with one line where a flag or a folder is wrong."""

from __future__ import annotations

import json
import re
import sys

import pytest

import columns
import gpu
import kill
import peers
import round_cost
import speed
import start_cost
import trajectories
from studies import dry_run, multi30k_oracle, multi30k_tables, oracle


@pytest.mark.parametrize(
    ("program", "flags", "said"),
    [
        (kill, "--seed 5 --output {folder}/kills.json", r"seed must be 0, that of .*kills\.json, got 5\. Set --seed"),
        (kill, "--shards 3", "shards must be 1 or 2, got 3. Set --shards."),
        (kill, "--points -1", "points must be >= 0, got -1. Set --points."),
        (peers, "--systems ddp foo", r"systems must be of \['ddp', .*, got \['foo'\]\. Set --systems\."),
        (peers, "--hosts 1", "hosts must be >= 2, got 1. Set --hosts."),
        (peers, "--rho 0", r"rho must be > 0, got \[0\.0\]\. Set --rho\."),
        (round_cost, "--parts step foo", "parts must be among step, .*, overlap, got foo. Set --parts."),
        (round_cost, "--step_repeats 0", "step_repeats must be >= 1, got 0. Set --step_repeats."),
        (speed, "--restarts 0", "restarts must be >= 1, got 0. Set --restarts."),
        (speed, "--before /nowhere", "before must be a folder that holds slowmo_hf, got '/nowhere'. Set --before."),
        (start_cost, "--rows 0", "rows must be >= 1, got 0. Set --rows."),
        (trajectories, "", "before must be a folder that holds slowmo_hf, got None. Set --before."),
        (columns, "--turns 0", "turns must be >= 1, got 0. Set --turns."),
        (gpu, "--minutes soon", "argument --minutes: invalid float value: 'soon'"),
        (gpu, "--no_such_flag 1", r"Some specified arguments are not used .* \['--no_such_flag', '1'\]"),
        (oracle, "{folder}", "folder must hold numbers.json, written by oracle_fairseq.py, got '{folder}'."),
        (multi30k_tables, "{folder}", "folder must hold multi30k/.*, written by reproduce.py .*, got '{folder}'."),
        (multi30k_oracle, "write {folder}", "inner_lr must be given to write a run, got None. Set --inner_lr."),
        (
            multi30k_oracle,
            "table {folder}",
            r"folder must hold multi30k/.*, written by the command score, got",
        ),
    ],
)
def test_one_line_says_what_is_wrong(tmp_path, monkeypatch, capfd, program, flags, said):
    (tmp_path / "kills.json").write_text(json.dumps({"seed": 0}))
    monkeypatch.setattr(sys, "argv", [program.__file__, *flags.replace("{folder}", str(tmp_path)).split()])
    with pytest.raises(SystemExit) as ended:
        program.main()
    name = program.__file__.rpartition("/")[2]
    line = ended.value.code
    assert re.match(f"{name}: {said.replace('{folder}', re.escape(str(tmp_path)))}", str(line)), line
    assert "\n" not in line
    assert "usage" not in capfd.readouterr().err


def test_arithmetic_needs_the_size_of_an_epoch(tmp_path, monkeypatch, capfd):
    """It would fail behind the made-up pairs, which take minutes at the real size."""
    record = tmp_path / "record.json"
    record.write_text("{}")
    flags = ["--parts", "arithmetic", "--pairs", "10", "--folder", str(tmp_path / "made"), "--record", str(record)]
    monkeypatch.setattr(sys, "argv", ["dry_run.py", *flags])
    with pytest.raises(SystemExit):
        dry_run.main()
    assert "parts must have preprocessing before arithmetic, or --record a file that has it" in capfd.readouterr().err
    assert not (tmp_path / "made").exists()
