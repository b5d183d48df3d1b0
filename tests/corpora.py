"""What tests of the translation recipe share: sentences of the shipped text, files of text, and sacreBLEU's score."""

import json
import subprocess
import sys
from pathlib import Path

import datasets

from launcher import RECIPE_ENVIRONMENT
from translation.data import load_corpus

datasets.disable_progress_bars()


def pairs(count: int) -> list[dict[str, str]]:
    """Short sentences of the shipped training text, all different."""
    rows = load_corpus(max_train_samples=600).train
    return [row for row in rows if 5 <= len(row["source"].split()) <= 9][:count]


def write_text(folder: Path, sets: dict[str, list[dict[str, str]]]) -> str:
    """`<split>.en` and `<split>.de`, a line per sentence."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in sets.items():
        for end, side in (("en", "source"), ("de", "target")):
            (folder / f"{split}.{end}").write_text("".join(f"{row[side]}\n" for row in rows), encoding="utf-8")
    return str(folder)


def sacrebleu_command(references: Path, hypotheses: Path, *flags: str) -> tuple[float, str]:
    """Score and signature that the command line prints."""
    command = [sys.executable, "-m", "sacrebleu", str(references), "-i", str(hypotheses), "-w", "12", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=RECIPE_ENVIRONMENT)
    said = json.loads(done.stdout)
    return said["score"], said["signature"]
