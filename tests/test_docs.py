"""
The docs: that they build, that they can be read, and that what they quote, link to and tell the reader to type is
there. A page's tables of figures are held beside the programs that make them.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import slowmo_hf

ROOT = Path(__file__).parents[1]
PAGES = sorted(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md"))
PAGES += sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")])
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
LINK = re.compile(r"!?\[([^\]]*)\]\(([^)\s]+)\)")


def text_of(name):
    return (ROOT / name).read_text()


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


def prose(text):
    """(number, line) outside of fenced blocks and comments."""
    inside, found = False, []
    for number, line in enumerate(text.splitlines(), 1):
        fence = bool(re.match(r"\s*```", line))
        if not inside and not fence and not line.lstrip().startswith("<!--"):
            found.append((number, line))
        inside ^= fence
    return found


# ---- the site ----


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_the_site_has_every_page(site):
    pages = {path.stem for path in ROOT.glob("docs/*.md")}
    assert {path.stem for path in site.glob("*.html")} >= pages
    assert not list(site.rglob("*.py"))


@pytest.mark.slow
def test_the_site_needs_no_network_and_every_link_in_it_leads_somewhere(site, subtests):
    for path in sorted(site.glob("*.html")):
        text = path.read_text()
        with subtests.test(path.name):
            assert not re.findall(r'<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)="(?:https?:)?//[^"]*', text)
            for target in re.findall(r'\b(?:href|src)="([^"]+)"', text):
                inside, _, _ = target.partition("#")
                if inside and not re.match(r"[a-z]+:|data:", inside):
                    # 404.html is served from any depth, so its links begin at the root.
                    assert (site / inside.lstrip("/").partition("?")[0]).exists(), target


@pytest.mark.slow
def test_lists_and_tables_are_some_on_the_site_too(site, subtests):
    """Other than in the repository, one that follows a line of prose needs an empty line before it."""
    for path in sorted(site.glob("*.html")):
        with subtests.test(path.name):
            article = path.read_text().partition("<article")[2].partition("</article>")[0]
            for paragraph in re.findall(r"<p>(.*?)</p>", article, re.DOTALL):
                assert not re.search(r"^\s*([-*] |\d+\. |\| )", paragraph, re.MULTILINE), paragraph[:200]


@pytest.mark.slow
def test_the_reference_has_every_public_name_with_the_types_of_its_signature(site):
    text = (site / "reference.html").read_text()
    for name in slowmo_hf.__all__:
        assert f'id="slowmo_hf.{name}"' in text, name
    assert "*optional*" not in re.sub(r"<[^>]+>", "", text)
    assert "optional</em>" not in text


@pytest.mark.slow
def test_the_changelog_is_the_repository_s(site):
    releases = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    shown = re.sub(r"<[^>]+>|[\[\]]", "", (site / "changelog.html").read_text())
    assert releases
    assert [release for release in releases if re.sub(r"[\[\]]", "", release) not in shown] == []
    assert "include:" not in shown


def _hooks():
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs/hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("repo_url", "source", "shown"),
    [
        (None, "[the file](../recipes/x.py)", "the file (`recipes/x.py`)"),
        (None, "[`recipes/x.py`](../recipes/x.py)", "`recipes/x.py`"),
        (None, "[x.py](../recipes/x.py#L3)", "`recipes/x.py`"),
        ("https://a.b/c/", "[x.py](../recipes/x.py#L3)", "[x.py](https://a.b/c/blob/main/recipes/x.py#L3)"),
        (None, "[how](../benchmarks/README.md#the-start)", "[how](benchmarks.md#the-start)"),
        (None, "![a picture](../recipes/p.png)", "![a picture](outside/recipes/p.png)"),
        (None, "[a page](wire.md)", "[a page](wire.md)"),
        (None, "```text\n[x](../y.py)\n```", "```text\n[x](../y.py)\n```"),
    ],
)
def test_links_out_of_the_docs(repo_url, source, shown):
    config = SimpleNamespace(repo_url=repo_url)
    assert _hooks().on_page_markdown(source, page=None, config=config, files=None) == shown


# ---- what a reader can take ----


def cells(line):
    """What a table's row shows: a link is its words."""
    shown = LINK.sub(r"\1", line.strip().strip("|")).replace("`", "").replace("**", "")
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", shown)]


@pytest.mark.parametrize("name", NAMES)
def test_lines_and_cells_are_short(name):
    """A line of prose has 120 characters at most, a cell of a table 100."""
    long = []
    for number, line in prose(text_of(name)):
        if line.lstrip().startswith("|"):
            long += [f"{name}:{number}: cell: {cell}" for cell in cells(line) if len(cell) > 100]
        elif len(line) > 120 and not line.startswith("!["):  # a picture is no prose
            long.append(f"{name}:{number}: {line}")
    assert not long, "\n".join(long)


def test_a_cell_is_what_it_shows():
    assert cells("| [a b](c.md) | `x` or **y** | 1 \\| 2 |") == ["a b", "x or y", "1 | 2"]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 900


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


def normal(words):
    return re.sub(r"\s+", " ", words)


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


def missing(block, said):
    """Fragments of a quotation that no literal has. `…` stands for what varies."""
    found = []
    for line in block:
        quoted = re.sub(r"^\s*(\[slowmo_hf\] )?(\w+(Error|Exception|Warning): )?", "", line)
        for fragment in quoted.split("…"):
            words = normal(fragment).strip()
            if len(re.findall(r"[^\W\d_]", words)) >= 6 and words not in said:
                found.append(words)
    return found


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


# ---- which settings go together ----

INNER_METHODS = ("local_sgd", "sgp", "osgp", "dpsgd", "all_reduce")
BESIDE_LOCAL_SGD = {
    "`overlap_steps=2`": {"overlap_steps": 2},
    "`compression`": {"compression": "int8"},
    "`shard_slow_state=True`": {"shard_slow_state": True},
    "`outer_optimizer` of torch": {"outer_optimizer": "torch.optim.SGD"},
    '`inner_state="reset"`': {"inner_state": "reset"},
    '`inner_state="average"`': {"inner_state": "average"},
}
ASKED = BESIDE_LOCAL_SGD | {
    "`exact_average=False`": {"exact_average": False},
    '`topology="ring"`': {"topology": "ring"},
    '`topology="exponential"`': {"topology": "exponential"},
    "`peers=2`": {"peers": 2},
    "`staleness=2`": {"staleness": 2},
    "`processes_per_worker=2`": {"processes_per_worker": 2},
}


def allowed(**settings):
    try:
        slowmo_hf.SlowMoConfig(**settings)
    except ValueError:
        return "no"
    return "yes"


def with_every_base():
    """Rows of the page's first table, as the configuration answers."""
    rows = [[words, *(allowed(base=base, **own) for base in INNER_METHODS)] for words, own in ASKED.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def with_each_other():
    """The second one."""
    rows = [["", *BESIDE_LOCAL_SGD], ["---"] * (len(BESIDE_LOCAL_SGD) + 1)]
    for words, own in BESIDE_LOCAL_SGD.items():
        both = ["" if own.keys() == other.keys() else allowed(**own, **other) for other in BESIDE_LOCAL_SGD.values()]
        rows.append([words, *both])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def test_the_tables_of_settings_are_what_the_configuration_answers():
    """The tables are printed where this fails: copy them."""
    page = (ROOT / "docs/compatibility.md").read_text()
    for table in (with_every_base(), with_each_other()):
        missing = [row for row in table.splitlines() if row not in page.splitlines()]
        assert not missing, "docs/compatibility.md lacks these rows:\n" + "\n".join(missing)
        assert table in page
    with pytest.raises(ValueError, match="compression") as refused:
        slowmo_hf.SlowMoConfig(base="sgp", compression="int8")
    assert f"ValueError: {refused.value}" in normal(page)


def test_the_versions_are_those_of_the_package():
    page, metadata = (ROOT / "docs/compatibility.md").read_text(), (ROOT / "pyproject.toml").read_text()
    needed = re.search(r"^dependencies = (\[.*?\])", metadata, re.MULTILINE)[1]
    for package, version in re.findall(r'"(\w+)>=([\d.]+)"', needed):
        assert re.search(rf"^\| {package} \| {re.escape(version)} or newer", page, re.MULTILINE), package
    assert f"| Python | {re.search('requires-python = .>=([0-9.]+)', metadata)[1]} or newer |" in page


# ---- where links lead ----


def anchors(text):
    """Of a page's headings, as the repository and the site make them."""
    found = []
    for _, line in prose(text):
        heading = re.match(r"#+\s+(.*)", line)
        if heading:
            words = LINK.sub(r"\1", heading[1]).strip().lower()
            slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
            found.append(slug if slug not in found else f"{slug}-{found.count(slug)}")
    return found


def test_anchors_by_hand():
    text = "# A `b` c\n## To τ\n## To τ\n```text\n# none\n```\n### 1.2, [what](x.md#y) & more"
    assert anchors(text) == ["a-b-c", "to-τ", "to-τ-1", "12-what--more"]


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_something(name):
    page, wrong = ROOT / name, []
    for number, line in prose(page.read_text()):
        for _, target in LINK.findall(re.sub(r"`[^`]*`", "", line)):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / path) if path else page
            if not file.exists():
                wrong.append(f"{name}:{number}: {target} does not exist")
            elif anchor and file.suffix == ".md" and anchor not in anchors(file.read_text()):
                wrong.append(f"{name}:{number}: {target}: there is no such heading")
    assert not wrong, "\n".join(wrong)


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
        "tests/test_reproduce.py::test_a_clusters_command_is_complete"
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
