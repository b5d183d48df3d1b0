"""The docs: what they quote is said, what they tell the reader to type is run, and their words are the field's."""

from __future__ import annotations

import ast
import inspect
import re

import pytest

import slowmo_hf
from pages import LINK, NAMES, ROOT, missing, normal, prose, text_of


def blocks(text):
    """(first line's number, info, lines, the line above) of every fenced block."""
    lines, found, start = text.splitlines(), [], None
    for number, line in enumerate(lines):
        if re.match(r"\s*```", line):
            if start is None:
                start = number
            else:
                above = lines[start - 1] if start else ""
                found.append((start + 1, lines[start].strip().removeprefix("```"), lines[start + 1 : number], above))
                start = None
    assert start is None, f"a block of line {start} has no end"
    return found


# ---- what is quoted ----


class _Literals(ast.NodeVisitor):
    """String literals of a source; what varies in them is a gap."""

    GAP = "\0"

    def __init__(self):
        self.found = []

    def visit(self, node):
        words = self.words(node)
        if words is None:
            self.generic_visit(node)
        else:
            self.found.append(words)

    def words(self, node):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.JoinedStr):
            for value in node.values:
                if isinstance(value, ast.FormattedValue):
                    self.generic_visit(value)  # strings inside of it
            return "".join(self.words(value) or self.GAP for value in node.values)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            left, right = self.words(node.left), self.words(node.right)
            if left is not None or right is not None:
                return (left or self.GAP) + (right or self.GAP)
        return None


@pytest.fixture(scope="module")
def literals():
    """All of the package and its programs, each on a line of its own."""
    found = []
    for folder in ("src/slowmo_hf", "recipes", "benchmarks", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            visitor = _Literals()
            visitor.visit(ast.parse(path.read_text()))
            found += visitor.found
    return "\n".join(normal(words.replace("%%", "%")) for words in found)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_quoted_is_said_somewhere(name, literals):
    wrong = [
        f"{name}:{number}: {words}"
        for number, info, lines, _ in blocks(text_of(name))
        if re.search(r'title="(error|log)"', info)
        for words in missing(lines, literals)
    ]
    assert not wrong, "\n".join(wrong)


def test_a_wrong_quotation_is_found(literals):
    right = "ValueError: sync_every must be >= 1 optimizer step, got …"
    assert missing([right], "x\nsync_every must be >= 1 optimizer step, got \0.") == []
    assert missing([right], "sync_every must be > 1 step") == ["sync_every must be >= 1 optimizer step, got"]
    visitor = _Literals()
    visitor.visit(ast.parse('say("a round of " f"{n} steps" " ends" + what)'))
    assert visitor.found == ["a round of \0 steps ends\0"]
    assert "base='local_sgd', got" in literals


# ---- what a reader is told to type ----


# What a command begins with, and the test that runs it, or the same program with other arguments.
COMMANDS = {
    r"make docs": "tests/test_docs.py::test_the_site_has_every_page",
    r"make train": "tests/test_recipes.py::test_record_is_complete_and_right",
    r"torchrun --nproc-per-node 2 train\.py$": ("tests/test_quickstarts.py::test_the_trainers_command_on_one_machine"),
    r"torchrun --nproc-per-node 2 program\.py$": (
        "tests/test_quickstarts.py::test_the_accelerate_commands_on_one_machine_and_on_two"
    ),
    r"torchrun --nnodes 2 --node-rank [01] --nproc-per-node 1 --master-addr \S+ --master-port 29500 train\.py$": (
        "tests/test_quickstarts.py::test_the_trainers_commands_on_two_machines"
    ),
    r"torchrun --nnodes 2 --node-rank [01] --nproc-per-node 1 --master-addr \S+ --master-port 29500 program\.py$": (
        "tests/test_quickstarts.py::test_the_accelerate_commands_on_one_machine_and_on_two"
    ),
    r"torchrun --nproc-per-node 2 train\.py --output_dir outputs --base sgp": (
        "tests/test_quickstarts.py::test_the_presets_and_flags_of_the_page"
    ),
    # Those of docs/launch.md.
    r"(torchrun --nnodes 2 --nproc-per-node 1 --node-rank 0 |torchrun --nproc-per-node 2 recipes/)": (
        "tests/test_launch.py::test_a_command_starts_what_the_page_says"
    ),
    r"accelerate launch --(multi_gpu|config_file recipes/configs/cpu_two_processes\.yaml recipes/image/train\.py$)": (
        "tests/test_launch.py::test_a_command_starts_what_the_page_says"
    ),
    r"nice python recipes/studies/dry_run\.py": "tests/test_dry_run.py::test_the_program_at_a_tiny_size",
    r"pip install git\+ADDRESS": "tests/test_packaging.py::test_pip_installs_it_from_git",
    r"torchrun --nproc-per-node 2 examples/accelerate_loop\.py --resume_from": (
        "tests/test_examples.py::test_accelerate_loop_and_its_resume"
    ),
    r"make (test|test-fast|lint)$": "tests/test_habits.py::test_each_job_calls_one_make_target_that_is_there",
    r"\.venv/bin/python -m pytest tests/test_core\.py -k two_rounds": "tests/test_core.py::test_two_rounds_by_hand",
    r"pip install \.": "tests/test_packaging.py::test_an_installed_wheel_works_outside_the_checkout",
    r"python benchmarks/round_cost\.py": "tests/test_benchmarks.py::test_the_command_writes_a_record",
    r"python benchmarks/start_cost\.py": "tests/test_benchmarks.py::test_start_cost_compares_with_stock",
    r"python benchmarks/speed\.py": "tests/test_benchmarks.py::test_speed_compares_two_checkouts",
    r"python benchmarks/trajectories\.py": (
        "tests/test_benchmarks.py::test_trajectories_say_what_a_change_of_the_update_does"
    ),
    r"python benchmarks/kill\.py": "tests/test_kill.py::test_a_killed_job_goes_on_by_itself_and_ends_the_same",
    r"python recipes/studies/reproduce\.py (--task translation )?--scale paper": (
        "tests/test_study_records.py::test_a_clusters_command_is_complete"
    ),
    r"python recipes/studies/reproduce\.py (--task translation )?--study": (
        "tests/test_reproduce.py::test_a_run_writes_a_record_and_is_not_run_again"
    ),
}


def commands(lines):
    """Of a block, each on one line, without comments and what it sets in the environment."""
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    bare = (re.sub(r"^(\w+=\S+(\s+|$))+", "", re.sub(r"(^|\s)#.*", "", line).strip()) for line in joined.splitlines())
    return [line for line in bare if line]


def untested(text):
    """Commands that no test of the table runs and that no comment excuses."""
    return [
        command
        for _, info, lines, above in blocks(text)
        if info.split() and info.split()[0] == "bash" and not re.match(r"\s*<!-- not run: .+ -->", above)
        for command in commands(lines)
        if not any(re.match(pattern, command) for pattern in COMMANDS)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_commands_are_run_by_a_test(name):
    found = untested(text_of(name))
    assert not found, f"{name}: no test runs these: " + "\n".join(found)


def test_an_untested_command_is_found():
    first = "```bash\n# first\nCUPS=2\nHOT=1 make tea \\\n    --hot   # now\n```\n"
    text = f"{first}<!-- not run: needs a GPU -->\n```bash\nmake gold\n```"
    assert untested(text) == ["make tea --hot"]


@pytest.mark.parametrize("test", sorted(set(COMMANDS.values())))
def test_the_tests_of_the_table_exist(test):
    path, _, name = test.partition("::")
    assert re.search(rf"^\s*def {name}\(", (ROOT / path).read_text(), re.MULTILINE)


# ---- words ----


# Private words, and the field's.
WORDS = {
    r"\bmeetings?\b": "status exchange",
    r"\b(?:a|the|each|every|per|another|last|first|no|that|this|such|before|after|between) looks?\b": "consensus view",
    r"\bLooks?\b(?! at| for| up| like| there)": "consensus view",
    r"\b(?:sets?|setting) out\b": "launch",
    r"\bdepart(?:s|ed|ing)?\b": "launch",
    r"\b(?:take|takes|taken|took|taking) in\b(?! (?:memory|bytes|seconds|time|training|all|order)\b)": "apply",
    r"\b(?:go|goes|going|gone|went) ahead\b": "in flight",
    r"\bbehind the (?:next steps' |next \w+ steps' )?computation\b": "while the next steps compute",
    r"\bleaders?\b": "replica group, counterpart, column",
    r"\b(?:freq|gmb|ps|utils|helpers?)\b": "the thing's own name",
    r"\b(?<!context )managers?\b": "the thing's own name",
    r"\bmaster\b(?! weights)": "rank 0, or the first machine",
}
# Where prose speaks of it; in the code it is the name of a setting.
OF_DOCS = {r"\b(?:gossip|other|all|the|both|of) bases\b|\bBases\b": "inner method"}


def private_words(text, table):
    bare = LINK.sub(r"\1", re.sub(r"`[^`]*`", "", text))
    return [f"{found[0]!r}: say {say!r}" for wrong, say in table.items() for found in re.finditer(wrong, bare)]


@pytest.mark.parametrize("name", NAMES)
def test_docs_use_the_fields_words(name):
    lines = prose(text_of(name))
    wrong = [f"{name}:{n}: {one}" for n, line in lines for one in private_words(line, WORDS | OF_DOCS)]
    assert not wrong, "\n".join(wrong)


def _is_docstring(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def test_what_is_said_in_a_run_uses_the_fields_words():
    """Every string of the package that is a sentence, but docstrings."""
    wrong = []
    for path in sorted((ROOT / "src/slowmo_hf").rglob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(getattr(node, "body", None), list):
                node.body = [one for one in node.body if not _is_docstring(one)] or [ast.Pass()]
        visitor = _Literals()
        visitor.visit(tree)
        said = [words for words in visitor.found if words.count(" ") >= 2]
        wrong += [f"{path.name}: {one} in {words!r}" for words in said for one in private_words(words, WORDS)]
    assert not wrong, "\n".join(wrong)


def test_the_reference_uses_the_fields_words():
    """Docstrings of what is public."""
    wrong = []
    for name in slowmo_hf.__all__:
        public = getattr(slowmo_hf, name)
        found = {name: public}
        if inspect.isclass(public):
            found |= {f"{name}.{own}": one for own, one in vars(public).items() if not own.startswith("_")}
        for where, one in found.items():
            words = inspect.getdoc(one) or ""
            if callable(one) or isinstance(one, property | classmethod):
                wrong += [f"{where}: {said}" for said in private_words(normal(words), WORDS)]
    assert not wrong, "\n".join(wrong)


def test_private_words_are_found_and_plain_english_is_not():
    for wrong in ("At the meeting", "a look waits", "what sets out", "it is taken in", "before, one goes ahead"):
        assert private_words(wrong, WORDS), wrong
    for right in ("what it takes in memory", "look at the log", "a context manager", "they meet", "`the meeting`"):
        assert not private_words(right, WORDS), right
