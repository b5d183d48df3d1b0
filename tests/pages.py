"""The pages of the docs, their texts, code blocks and words."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md"))
PAGES += sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")])
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
LINK = re.compile(r"!?\[([^\]]*)\]\(([^)\s]+)\)")


def text_of(name):
    return (ROOT / name).read_text()


def prose(text):
    """(number, line) outside of fenced blocks and comments."""
    inside, found = False, []
    for number, line in enumerate(text.splitlines(), 1):
        fence = bool(re.match(r"\s*```", line))
        if not inside and not fence and not line.lstrip().startswith("<!--"):
            found.append((number, line))
        inside ^= fence
    return found


def normal(words):
    return re.sub(r"\s+", " ", words)


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
