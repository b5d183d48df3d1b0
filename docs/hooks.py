"""
What the site does to a page beyond Markdown, so that one text reads well in the repository and on the site: links to
files outside `docs/`, pictures that lie beside their records, and the changelog.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
# A file of the repository that has a page here.
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "benchmarks/README.md": "benchmarks.md"}
INCLUDE = re.compile(r"<!-- include: \.\./(\S+) -->")
LINK = re.compile(r"(?P<picture>!?)\[(?P<words>[^\]]*)\]\(\.\./(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
FENCE = re.compile(r"(^```.*?^```\s*?$)", re.MULTILINE | re.DOTALL)


def on_files(files: Any, *, config: Any) -> Any:
    """Pictures outside `docs/` come along, under `outside/` and their path in the repository."""
    for page in list(files.documentation_pages()):
        for found in LINK.finditer(Path(page.abs_src_path).read_text()):
            name, source = f"outside/{found['path']}", ROOT / found["path"]
            # One that is missing is a link that leads nowhere, which ends a strict build.
            if found["picture"] and source.exists() and files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, abs_src_path=str(source)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """One page, as the site has it."""
    whole = INCLUDE.sub(_included, markdown)
    parts = FENCE.split(whole)
    for n in range(0, len(parts), 2):  # every second part is code
        parts[n] = LINK.sub(lambda found: _link(found, config), parts[n])
    return "".join(parts)


def _included(found: re.Match[str]) -> str:
    """A file of the repository's root without its title; its links are from there."""
    return (ROOT / found[1]).read_text().partition("\n")[2].replace("](docs/", "](")


def _link(found: re.Match[str], config: Any) -> str:
    words, path, anchor = found["words"], found["path"], found["anchor"] or ""
    if found["picture"]:
        return f"![{words}](outside/{path})"
    if path in PAGES:
        return f"[{words}]({PAGES[path]}{anchor})"
    if config.repo_url:
        return f"[{words}]({config.repo_url.rstrip('/')}/blob/main/{path}{anchor})"
    bare = words.strip("`")
    return f"`{path}`" if path.endswith(bare) else f"{words} (`{path}`)"
