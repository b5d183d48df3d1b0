"""`make gpu`: what it runs, what it leaves alone, what its records say, with made-up slices; and a dry run."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import gpu
from gpu import Records, Slice, run_slices

DEVICE = {"name": "a card", "memory_gib": 80.0}
COUNT = "open('runs', 'a').write('{0}\\n'); open(r'{{figures}}', 'w').write('{{\"answer\": 42}}')"


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A project of two files; programs run there and note in `runs` that they have."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "package.py").write_text("first")
    (tmp_path / "part.py").write_text("first")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    return tmp_path


def made_up(name, code=None, seconds=1.0, **settings):
    code = COUNT.format(name) if code is None else code
    return Slice(name, f"says {name}", ("-c", code), seconds, **settings)


def run(root, found, minutes=1.0, device=DEVICE, again=None):
    """{name: state}, and the names of those that have run."""
    (root / "runs").write_text("")
    states = run_slices(found, Records(root / "records", device), minutes, again)
    return {name: state for name, (state, _) in states.items()}, (root / "runs").read_text().split()


def record(root, name):
    return json.loads((root / "records" / f"{name}.json").read_text())


def test_each_runs_once_and_leaves_a_record(root, capsys):
    found = [made_up("b"), made_up("a")]
    assert run(root, found) == ({"b": "done", "a": "done"}, ["b", "a"])
    kept = record(root, "b")
    assert {"slice", "says", "state", "command", "date", "device", "hardware", "versions", "commit", "sources"} < set(
        kept
    )
    assert (kept["slice"], kept["state"], kept["exit_code"]) == ("b", "done", 0)
    assert kept["device"] == DEVICE
    assert kept["figures"] == {"answer": 42}
    assert {"python", "torch", "slowmo_hf"} < set(kept["versions"])
    assert kept["seconds"] >= 0
    capsys.readouterr()
    assert run(root, found) == ({"b": "done", "a": "done"}, [])
    assert "--again b repeats it" in capsys.readouterr().out
    assert run(root, found, again="a")[1] == ["a"]
    assert sorted(path.name for path in (root / "records").iterdir()) == ["a.json", "b.json"]


def test_a_failure_is_recorded_and_the_next_one_runs(root):
    found = [made_up("bad", "print('before'); raise SystemExit('no luck')"), made_up("good")]
    assert run(root, found) == ({"bad": "failed", "good": "done"}, ["good"])
    kept = record(root, "bad")
    assert (kept["state"], kept["exit_code"]) == ("failed", 1)
    assert kept["output_tail"].split("\n")[:2] == ["before", "no luck"]
    assert run(root, found)[0]["bad"] == "failed", "it still counts as failed"
    found[0] = made_up("bad")  # another command: another slice
    assert run(root, found) == ({"bad": "done", "good": "done"}, ["bad"])


def test_what_would_not_end_in_time_is_not_started(root):
    found = [made_up("long", seconds=7), made_up("short", seconds=2)]
    assert run(root, found, minutes=0.1) == ({"long": "left", "short": "done"}, ["short"])
    assert not (root / "records" / "long.json").exists()
    assert run(root, found, minutes=0.2) == ({"long": "done", "short": "done"}, ["long"])


@pytest.mark.slow
def test_what_does_not_end_in_time_is_ended_and_waits_for_more_time(root):
    """It and what it has started: the child would write after a second."""
    child = "import time; time.sleep(1); open('late', 'w')"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    found = [made_up("slow", code, seconds=0.1), made_up("next", seconds=5)]
    assert run(root, found, minutes=0.5 / 60)[0] == {"slow": "stopped", "next": "left"}
    assert record(root, "slow")["exit_code"] is None
    assert run(root, found, minutes=0.5 / 60)[0] == {"slow": "left", "next": "left"}, "no longer than last time"
    time.sleep(1)
    assert not (root / "late").exists()
    assert run(root, found, minutes=1.8 / 60)[0]["slow"] == "stopped"


@pytest.mark.parametrize("file", ["src/package.py", "part.py"])
def test_other_sources_run_again(root, file):
    found = [made_up("a", sources=("part.py",))]
    run(root, found)
    (root / "elsewhere.py").write_text("no source of it")
    assert run(root, found)[1] == []
    (root / file).write_text("second")
    assert run(root, found)[1] == ["a"]


def test_another_device_runs_again(root):
    found = [made_up("a")]
    run(root, found)
    assert run(root, found, device={"name": "another card"}) == ({"a": "done"}, ["a"])


def test_what_cannot_run_here_says_why_and_is_tried_again(root):
    found = [
        made_up("lacks", needs=("json", "no_such_package")),
        made_up("refuses", why_not=lambda: "no folder"),
        made_up("good"),
    ]
    assert run(root, found) == ({"lacks": "not run", "refuses": "not run", "good": "done"}, ["good"])
    assert record(root, "lacks")["why"] == "package no_such_package is missing"
    assert record(root, "refuses")["why"] == "no folder"
    assert run(root, [made_up("lacks"), *found[1:]])[1] == ["lacks"]


def test_a_program_that_goes_on_by_itself_is_called_each_time(root):
    found = [made_up("a"), made_up("study", "open('runs', 'a').write('{minutes}\\n')", goes_on=True)]
    assert run(root, found, minutes=5)[1] == ["a", "4.5"]
    assert run(root, found, minutes=3)[1] == ["2.5"]


def test_the_study_is_one_call_of_the_recipe(root, monkeypatch):
    monkeypatch.setattr(gpu, "STUDY_SECONDS", 1)
    program = root / "recipes" / "studies" / "reproduce.py"
    program.parent.mkdir(parents=True)
    program.write_text("print('--scale')")
    assert "no folder of CIFAR-10 at images" in gpu.study("images").why_not()
    assert "shared/data/cifar10" in gpu.study(None).why_not()
    (root / "images").mkdir()
    assert gpu.study("images").why_not() is None
    program.write_text("import no_such_package")
    assert "No module named 'no_such_package'" in gpu.study("images").why_not()
    program.write_text("import sys\nprint('--minutes')\nopen('runs', 'a').write(' '.join([*sys.argv[1:], '']))")
    states, words = run(root, [gpu.study("images")], minutes=4)
    assert states == {"study": "done"}
    assert words == ["--help", "--scale", "gpu", "--minutes", "3.5", "--dataset_name", "images"]


def test_every_slice_has_its_sources_and_its_program():
    for device in ("cuda", "cpu"):
        found = gpu.slices(device, None)
        assert len({slice_.name for slice_ in found}) == len(found)
        for slice_ in found:
            for pattern in slice_.sources:
                assert list(gpu.ROOT.glob(pattern)), f"{slice_.name}: {pattern}"
    names = [slice_.name for slice_ in gpu.slices("cuda", None)]
    assert names[0] == "trainer"
    assert names[-1] == "study"
    assert sum(slice_.seconds for slice_ in gpu.slices("cuda", None)[:4]) < 9 * 60
    (sharded,) = [slice_ for slice_ in gpu.slices("cuda", None) if slice_.name == "sharded"]
    assert "tests/fsdp.py" in sharded.sources
    assert sharded.seconds < 9 * 60, "it fits one call"
    assert gpu.checks("x", "", "test_cuda.py", "cpu").command[6] == "not cuda"
    files = {path.name for path in (gpu.ROOT / "tests").glob("test_cuda*.py")}
    words = [word for slice_ in gpu.slices("cuda", None) for word in slice_.command]
    assert files == {Path(word).name for word in words if word.startswith("tests/")}


def test_targets_and_table_in_words():
    figures = {"part": {"a / b": {"ratio": 1.2, "target": "<= 1.5", "met": True}, "n": 3}, "tests": ["passed"]}
    assert gpu.targets(figures) == ["a / b 1.2 (<= 1.5, met)"]
    assert gpu.targets(None) == []
    lines = gpu.table({"a": ("done", ""), "b": ("stopped", ""), "c": ("failed", ""), "d": ("done", "")}).splitlines()
    assert lines == ["done     2  a, d", "failed   1  c", "not run  0  ", "left     1  b"]


def test_the_exit_code_says_whether_a_slice_failed(root, monkeypatch, capsys):
    found = [made_up("bad", "raise SystemExit(3)"), made_up("good")]
    monkeypatch.setattr(gpu, "slices", lambda device, dataset_name: found)
    monkeypatch.setattr(gpu.signal, "signal", lambda *args: None)

    def exit_code(*flags):
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--output", "records", *flags])
        with pytest.raises(SystemExit) as ended:
            gpu.main()
        return ended.value.code

    assert exit_code("--only", "good", "--commit", "abc") == 0
    assert record(root, "good")["commit"] == "abc"
    assert exit_code() == 1
    assert "failed   1  bad" in capsys.readouterr().out
    assert exit_code("--only", "ugly") == "gpu.py: only must be one of bad, good, got 'ugly'."
    assert exit_code("--again", "ugly") == "gpu.py: again must be one of bad, good, got 'ugly'."


def test_a_machine_without_a_card_is_told(monkeypatch):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match=r"finds none\. --device cpu is a dry run"):
        gpu.main()


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_dry_run(tmp_path):
    """`make gpu` on the CPU: the slice leaves a whole record, which another call would take as done."""
    flags = f"--device cpu --minutes 1 --only arithmetic --output {tmp_path}"
    command = ["make", "gpu", f"GPU_PYTHON={sys.executable}", f"ARGS={flags}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert (path.stem, record["state"]) == ("arithmetic", "done")
    assert {"device", "versions", "commit", "figures", "seconds"} <= set(record)
    assert gpu.targets(record["figures"]), "a ratio and its target"
    assert "done     1  arithmetic" in done.stdout


def test_the_page_says_what_the_records_of_a_card_say():
    page = (gpu.ROOT / "docs" / "benchmarks.md").read_text()
    records = [json.loads(path.read_text()) for path in sorted((gpu.ROOT / gpu.OUTPUT["cuda"]).glob("*.json"))]
    tests = [record for record in records if "pytest" in record["command"]]
    assert tests
    for record in tests:
        assert "H100" in record["device"]["name"]
        ended = [case["ended"] for case in record["figures"].values()]
        row = f"| `{record['slice']}` | {ended.count('passed')} of {len(ended)} tests passed"
        assert row in page, row
