"""
The translation recipe beside fairseq 0.12.2, the system of the paper's WMT'16 rows, piece by piece: one table, a row
a piece, "equal to N digits" or "different: why". `oracle_fairseq.py` has run before in an environment of its own (it
says how to make it) and left a folder:

    ORACLE/bin/python recipes/studies/oracle_fairseq.py FOLDER
    python recipes/studies/oracle.py FOLDER --record recipes/records/translation/oracle.json

Models are tiny, with the structure of `big` and `base`: copied weights, equal tokens, no dropout, float64. Digits are
those of the largest difference over the largest value; both take the loss in float32, which leaves 6 or 7.

Where the two differ on purpose, the difference is taken out of a comparison to see whether anything else is left: then
the model gets fairseq's positions and starts with `</s>`, as the row of each says.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import datasets
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes/, whose folders share modules

from records import DataError, check_holds, end_program, environment, write_record
from studies.oracle_model import forward, initial, positions, shapes
from studies.oracle_results import Fairseq, row
from studies.oracle_training import batches, optimizer, trajectories
from studies.oracle_translations import average, beams


def main() -> None:
    """Compare, print the table, and write it down where `--record` says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="what oracle_fairseq.py wrote")
    parser.add_argument("--record", type=Path, help="a JSON file to write the table to")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    try:
        check_holds(asked.folder, "numbers.json", "oracle_fairseq.py")
        check_holds(asked.folder, "tensors.pt", "oracle_fairseq.py")
    except DataError as error:
        end_program(__file__, error)
    numbers = json.loads((asked.folder / "numbers.json").read_text())
    rows = rows_of(Fairseq(numbers, torch.load(asked.folder / "tensors.pt", weights_only=True)))
    record = {"study": "oracle", "task": "translation", "rows": rows, "theirs": numbers["versions"]}
    record |= environment([datasets])
    record["command"] = "python recipes/studies/oracle.py FOLDER"
    print(table(record))
    if asked.record:
        write_record(record, asked.record)


def rows_of(fairseq: Fairseq) -> list[dict[str, Any]]:
    """All that is compared."""
    return [
        *shapes(fairseq),
        *forward(fairseq),
        positions(fairseq),
        row("first token of a translation", different="`<pad>` (Marian), there `</s>`"),
        *initial(fairseq),
        *optimizer(fairseq),
        *trajectories(fairseq),
        *batches(fairseq),
        *beams(fairseq),
        average(fairseq),
    ]


def table(record: dict[str, Any]) -> str:
    """A row a piece."""
    lines = ["| piece | against fairseq 0.12.2 |", "|---|---|"]
    return "\n".join([*lines, *(f"| {row['piece']} | {row['verdict']} |" for row in record["rows"])])


if __name__ == "__main__":
    main()
