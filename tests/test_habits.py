"""The repository's habits: what CI calls is there and runs here too; what is said twice is said alike."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import types
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import slowmo_hf
from harness import run_workers

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.yml"))
FORMS = sorted(ROOT.glob(".github/ISSUE_TEMPLATE/*.yml"))
IN_YAML = [*WORKFLOWS, *FORMS, ROOT / "CITATION.cff", ROOT / ".pre-commit-config.yaml"]


def parsed(path):
    return yaml.safe_load(path.read_text())


def entry(name):
    """A value of pyproject.toml: a string, or a list of strings (Python 3.10 has no tomllib)."""
    (text,) = re.findall(rf'^{name} = ("[^"]*"|\[[^]]*\])$', PYPROJECT, re.MULTILINE)
    found = re.findall(r'"([^"]*)"', text)
    return found if text.startswith("[") else found[0]


def jobs():
    return {name: job for path in WORKFLOWS for name, job in parsed(path)["jobs"].items()}


def pythons(job):
    """The Python versions that a job runs with."""
    (setup,) = (step["with"] for step in job["steps"] if step.get("uses", "").startswith("actions/setup-python"))
    told = setup["python-version"]
    return job["strategy"]["matrix"]["python"] if "matrix" in told else [told]


# ---- the workflow ----


@pytest.mark.parametrize("path", IN_YAML, ids=lambda path: path.name)
def test_it_is_yaml(path):
    assert isinstance(parsed(path), dict)


def test_each_job_calls_one_make_target_that_is_there():
    called = {}
    for name, job in jobs().items():
        (command,) = (step["run"] for step in job["steps"] if "run" in step)
        make, target = shlex.split(command)
        assert make == "make", command
        called[name] = target
    assert set(called.values()) <= TARGETS
    assert set(called.values()) == {"lint", "test-fast", "test", "floors", "newest", "wheel", "docs"}


def test_actions_are_pinned_by_their_major_version():
    used = {step["uses"] for job in jobs().values() for step in job["steps"] if "uses" in step}
    assert used == {"actions/checkout@v4", "actions/setup-python@v5"}


def test_the_workflow_runs_on_pushes_and_pull_requests_and_may_read_alone():
    for path in WORKFLOWS:
        workflow = parsed(path)
        assert {"push", "pull_request"} <= set(workflow[True])  # YAML 1.1 reads the key `on` as true
        assert workflow["permissions"] == {"contents": "read"}


def test_scripts_that_make_calls_are_there_and_may_be_run():
    called = set(re.findall(r"(?<![\w/])\.ci/\w+", MAKEFILE))
    assert called == {".ci/floors", ".ci/wheel"}
    for script in called:
        path = ROOT / script
        assert path.stat().st_mode & 0o111, script
        subprocess.run(["bash", "-n", str(path)], check=True)


# ---- versions: said once, or alike ----


def test_python_versions_are_those_that_are_tested():
    """requires-python, the classifiers and CI's matrix; the oldest libraries are tried with the oldest Python."""
    matrix = pythons(jobs()["tests"])
    named = [c.rpartition(" ")[2] for c in entry("classifiers") if re.fullmatch(r".*Python :: 3\.\d+", c)]
    assert matrix == named
    oldest, supported = matrix[0], SpecifierSet(entry("requires-python"))
    minor = int(oldest.split(".")[1])
    assert supported.contains(oldest)
    assert not supported.contains(f"3.{minor - 1}.99")
    assert named == [f"3.{m}" for m in range(minor, minor + len(named))]
    assert pythons(jobs()["floors"]) == [oldest]
    assert f'target-version = "py{oldest.replace(".", "")}"' in PYPROJECT
    for job in jobs().values():
        assert set(pythons(job)) <= set(matrix)


def test_oldest_libraries_are_those_that_pyproject_allows():
    """`.ci/floors` prints each requirement's lowest version, and nothing else."""
    printed = subprocess.run([ROOT / ".ci/floors"], check=True, capture_output=True, text=True).stdout.split()
    wanted = [Requirement(line) for line in entry("dependencies")]
    assert {r.name for r in wanted} == {"torch", "accelerate", "transformers"}
    for requirement, line in zip(wanted, map(Requirement, printed), strict=True):
        assert line.name == requirement.name
        ((lowest,), (pinned,)) = requirement.specifier, line.specifier
        assert (lowest.operator, pinned.operator) == (">=", "==")
        assert lowest.version == pinned.version
    floors = MAKEFILE.partition("-floors/.ready: ")[2].partition("touch")[0]
    assert ".ci/floors >" in floors
    assert '-e ".[recipes,docs]"' in floors


def test_classifiers_are_known_ones():
    known = pytest.importorskip("trove_classifiers").classifiers  # comes with hatchling
    assert set(entry("classifiers")) <= known


def test_one_version_everywhere():
    assert entry("version") == slowmo_hf.__version__
    citation = parsed(ROOT / "CITATION.cff")
    assert citation["version"] == slowmo_hf.__version__
    top = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
    date = citation.get("date-released")  # there is one when it is released
    assert top == (f"[{slowmo_hf.__version__}] - {date}" if date else "[Unreleased]")


def test_citation_names_the_paper():
    citation = parsed(ROOT / "CITATION.cff")
    assert (citation["cff-version"], citation["type"], citation["license"]) == ("1.2.0", "software", entry("license"))
    (paper,) = citation["references"]
    assert [author["family-names"] for author in paper["authors"]] == ["Wang", "Tantia", "Ballas", "Rabbat"]
    assert paper["url"].endswith("1910.00643")


def test_the_address_of_the_project_metadata_is_the_papers_alone():
    """A public repository is not there yet: no address that leads nowhere."""
    urls = PYPROJECT.partition("[project.urls]\n")[2].partition("\n\n")[0]
    assert urls == 'Paper = "https://huggingface.co/papers/1910.00643"'


# ---- the changelog ----


def test_the_changelog_keeps_its_form():
    """Keep a Changelog: versions, in each Added, Changed, Fixed; an entry is one or two lines."""
    lines = (ROOT / "CHANGELOG.md").read_text().splitlines()
    assert not [(number, line) for number, line in enumerate(lines, 1) if len(line) > 120]
    kinds = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
    assert {line for line in lines if line.startswith("### ")} <= {f"### {kind}" for kind in kinds}
    body = "\n".join(lines).partition("\n### ")[2]
    entries = re.findall(r"^- .*(?:\n  .*)*", body, re.MULTILINE)
    assert len(entries) > 20
    assert [e for e in entries if e.count("\n") > 1] == []
    for line in body.splitlines()[1:]:
        assert not line or line.startswith(("## [", "### ", "- ", "  ")), line


# ---- forms, hooks, addresses ----


def test_the_versions_command_of_the_bug_form_prints_them():
    (field,) = (f for f in parsed(ROOT / ".github/ISSUE_TEMPLATE/bug.yml")["body"] if f.get("id") == "versions")
    (command,) = re.findall(r"```bash\n(.*)\n```", field["attributes"]["description"])
    program, flag, code = shlex.split(command)
    assert (program, flag) == ("python", "-c")
    printed = subprocess.run([sys.executable, flag, code], check=True, capture_output=True, text=True).stdout
    assert f"slowmo-hf {version('slowmo-hf')}\ntorch {version('torch')}\n" in printed
    assert f"accelerate {version('accelerate')}\ntransformers {version('transformers')}\n" in printed


def test_issue_forms_ask_for_what_a_report_needs():
    bug = {field["id"]: field for field in parsed(ROOT / ".github/ISSUE_TEMPLATE/bug.yml")["body"] if "id" in field}
    assert {"what", "versions", "launch", "config", "log"} == {
        name for name, field in bug.items() if field.get("validations", {}).get("required")
    }
    for path in FORMS:
        form = parsed(path)
        if path.name == "config.yml":
            assert set(form) == {"blank_issues_enabled"}
        else:
            assert {"name", "description", "body"} <= set(form)
            assert {field["type"] for field in form["body"]} <= {"markdown", "textarea", "input", "dropdown"}


def test_hooks_fetch_nothing_and_do_what_make_lint_does():
    (repo,) = parsed(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repo["repo"] == "local"
    assert {hook["language"] for hook in repo["hooks"]} == {"system"}
    (lint,) = re.findall(r"^lint: .*\n\t(.*)$", MAKEFILE, re.MULTILINE)
    commands = [command.strip().replace("$(BIN)", ".venv/bin").removesuffix(" .") for command in lint.split("&&")]
    assert [hook["entry"] for hook in repo["hooks"]] == [command.replace("check .", "check") for command in commands]


def test_commands_of_contributing_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert set(re.findall(r"\bmake ([a-z-]+)", text)) <= TARGETS
    paths = re.findall(r"`((?:tests|src|docs|benchmarks|recipes)/[\w./]+)`", text)
    paths += re.findall(r"\]\(([^)#]+)[^)]*\)", text)
    assert len(paths) > 6
    for path in [*paths, *(f"src/slowmo_hf/{name}" for name in re.findall(r"`(algorithm/\w+\.py)`", text))]:
        assert (ROOT / path).exists(), path
    assert ".venv/bin/python -m pytest tests/test_core.py -k two_rounds" in text
    assert "two_rounds" in (ROOT / "tests/test_core.py").read_text()


def test_what_security_says_of_checkpoints_is_so():
    """The code reads no pickle of a checkpoint; objects of other processes are the one place for pickles."""
    sources = "\n".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    loads = re.findall(r"torch\.load\((.*)\)", sources)
    assert loads
    assert all("weights_only=True" in call for call in loads)
    assert re.findall(r"^(?:import|from) (?:c?[pP]ickle|marshal|shelve|dill)\b", sources, re.MULTILINE) == []
    assert "pickle" in (ROOT / "SECURITY.md").read_text()


def test_no_file_names_a_registry_host():
    """Which index pip asks is the user's to say (PIP_CONSTRAINT, pip.conf), never a file's here."""
    hosts = re.compile(
        "|".join((r"pypi\.(?:org|python)", r"pythonhosted", r"download\.py" + "torch", "index-" + "url"))
    )
    tracked = [
        *ROOT.glob("*.*"),
        *ROOT.glob(".*.yaml"),
        ROOT / "Makefile",
        *(
            path
            for folder in (".ci", ".github", "docs", "src", "recipes", "benchmarks")
            for path in (ROOT / folder).rglob("*")
        ),
    ]
    read = [
        path
        for path in tracked
        if path.is_file() and path.suffix in ("", ".md", ".py", ".toml", ".yml", ".yaml", ".txt", ".cff")
    ]
    assert {"pyproject.toml", "Makefile", "ci.yml", "run", "constraints.txt"} <= {path.name for path in read}
    assert [path for path in read if hosts.search(path.read_text(errors="ignore"))] == []


def wrapped(folder):
    """By class: methods of torch, accelerate and transformers that are code of ours, once all that wraps has run."""
    from accelerate import Accelerator

    accelerator, model = Accelerator(cpu=True), torch.nn.Linear(2, 1)
    optimizer = slowmo_hf.SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), slowmo_hf.SlowMoConfig())
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.save_state(folder)
    accelerator.load_state(folder)
    accelerator.backward(model(torch.ones(2)))
    optimizer.step()
    found = {}
    own = str(Path(slowmo_hf.__file__).parent)
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] not in ("torch", "accelerate", "transformers"):
            continue
        for kind in [one for one in list(vars(module).values()) if issubclass(type(one), type)]:
            for method, given in vars(kind).items():
                code = getattr(getattr(given, "__func__", given), "__code__", None)
                if isinstance(code, types.CodeType) and code.co_filename.startswith(own):
                    found.setdefault(kind.__name__, set()).add(method)
    return found


def test_what_is_wrapped_of_others_is_told(tmp_path):
    (found,) = run_workers(wrapped, 1, tmp_path)
    page = (ROOT / "docs/internals.md").read_text()
    table = page.partition("## What of others is wrapped")[2].partition("## How to add")[0]
    told = {}
    for kinds, methods in re.findall(r"^\| (`[^|]+`) \| (`[^|]+`) \|", table, re.MULTILINE):
        for kind in re.findall(r"\w+", kinds):
            told.setdefault(kind, set()).update(re.findall(r"\w+", methods))
    assert told == found
