"""The docs: that they build, that they can be read, and that their links and tables of settings are right."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

import slowmo_hf
from pages import LINK, NAMES, ROOT, normal, prose, text_of

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


def test_the_reference_says_where_every_public_name_is_defined():
    """For readers of the repository, who see no docstrings there."""
    page = (ROOT / "docs/reference.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| .+ \| \[\w+\.py\]\((.+?)\) \|$", page, re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(slowmo_hf.__all__)
    for name, file in rows:
        assert re.search(rf"^(def |class )?{name}\b", (ROOT / "docs" / file).read_text(), re.MULTILINE), name


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
