"""
Multi30k by fairseq 0.12.2, beside AR-Adam of `reproduce.py --task multi30k`: the same tokens, batches, updates,
learning rates and search, its own model, Trainer and dropout. Four commands, the second in fairseq's environment
(`oracle_fairseq.py` says how to make it):

    python recipes/studies/multi30k_oracle.py write FOLDER --dataset_name MULTI30K --inner_lr 0.005 --seed 1
    ORACLE/bin/python recipes/studies/multi30k_fairseq.py FOLDER
    python recipes/studies/multi30k_oracle.py score FOLDER --dataset_name MULTI30K --records recipes/records
    python recipes/studies/multi30k_oracle.py table recipes/records   # beside our runs of the same rates and seeds

A folder is of one run: another rate or seed in it is refused.

What differs, and is each system's own: fairseq divides the gradient of all workers' tokens by their number, ours is
the mean of the workers' means; its smoothing leaves the right token out, its decoder starts with </s>, its positions
count from behind the padding's id, its Adam adds eps before the bias correction, its learning rate is an update behind
(`oracle.py` has the sizes of most).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes/, whose folders share modules

from records import DataError, SettingError, check_holds, end_program, environment, mean_sd, write_record
from studies import multi30k
from studies.plan import Run, make_run, run_of
from studies.run_records import check_same_data, find_record
from studies.same_run import OtherRunError, check_same_run, identity
from studies.showing import paired_gain
from studies.small_translation import (
    LABEL_SMOOTHING,
    Translations,
    facts_of,
    judging_of,
)
from translation.bleu import bleu_signature
from translation.judged import all_scores, named
from translation.model import MODEL_SIZES, decode
from translation.tokens import TokenBatches


def main() -> None:
    """One of the three commands here."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("command", choices=("write", "score", "table"))
    parser.add_argument("folder", type=Path, help="what is handed to fairseq and back; table: records")
    parser.add_argument("--dataset_name", help="write, score: a folder with Multi30k")
    parser.add_argument(
        "--inner_lr", type=float, help="write: peak learning rate, as tuning has chosen it for AR-Adam"
    )
    parser.add_argument("--seed", type=int, default=1, help="write: of batches and weights")
    parser.add_argument("--records", type=Path, help="score: folder of the records")
    asked = parser.parse_args()
    if asked.command == "write" and asked.inner_lr is None:
        end_program(__file__, "inner_lr must be given to write a run, got None. Set --inner_lr.")
    try:
        if asked.command == "table":
            check_holds(asked.folder, "multi30k/fairseq_*.json", "the command score")
            print(table(asked.folder))
            return
        data = multi30k.load(asked.dataset_name)
        if asked.command == "write":
            write(make_run("table1", "multi30k", "all_reduce", 0.0, asked.inner_lr, asked.seed), data, asked.folder)
            return
        if asked.records:
            check_same_data(data, "multi30k", asked.dataset_name, asked.records)
        record = score_folder(asked.folder, data)
    except (DataError, OtherRunError, SettingError) as error:
        end_program(__file__, error)
    print({name: round(value, 4) for name, value in record["metrics"].items()})
    if asked.records:
        run = record["run"]
        write_record(record, asked.records / f"multi30k/fairseq_lr{run['inner_lr']}_seed{run['seed']}.json")


def write(run: Run, data: Translations, folder: Path) -> None:
    """`given.pt`; raises `OtherRunError` where the folder holds another run."""
    file, new = folder / "given.pt", given(run, data)
    if file.exists():
        check_same_run(identity(torch.load(file, weights_only=True)), identity(new), file)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(new, file)


def score_folder(folder: Path, data: Translations) -> dict[str, Any]:
    """
    The record of a folder.

    Raises:
        DataError: A half of it is missing.
        OtherRunError: Its translations are not of its run, or of these data.
    """
    check_holds(folder, "given.pt", "the command write")
    check_holds(folder, "translations.pt", "multi30k_fairseq.py")
    handed, file = folder / "given.pt", folder / "translations.pt"
    asked, told = (torch.load(path, weights_only=True) for path in (handed, file))
    run, written = run_of(asked["run"]), identity(asked)
    check_same_run(told.get("identity"), written, file)
    data_of_write = "Set --dataset_name to the data that `write` was given."
    check_same_run(written, identity(given(run, data)), handed, data_of_write)
    return score(run, told, data)


def given(run: Run, data: Translations) -> dict[str, Any]:
    """What fairseq needs of a run: tokens, the rows of every worker's batch of every update, and the settings."""
    samplers = [
        TokenBatches(data.lengths, run.batch_size, seed=run.seed, rank=rank, world_size=run.workers)
        for rank in range(run.workers)
    ]
    epochs = []
    for epoch in range(run.epochs):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        epochs.append([list(update) for update in zip(*samplers, strict=True)])
    return {
        "run": asdict(run),
        "vocabulary": len(data.tokenizer),
        **{
            name: [(row["input_ids"], row["labels"]) for row in part.rows]
            for name, part in (("train", data.train), ("validation", data.validation), ("test", data.test))
        },
        "epochs": epochs,
        "shape": MODEL_SIZES[data.size.model],
        "warmup_updates": round(run.warmup_epochs * len(samplers[0])),
        "label_smoothing": LABEL_SMOOTHING,
        "num_beams": judging_of(run).num_beams,
        "length_penalty": judging_of(run).length_penalty,
    }


def score(run: Run, told: dict[str, Any], data: Translations) -> dict[str, Any]:
    """The record of a run that fairseq has trained: every score of the best, the last and the mean model."""
    metrics: dict[str, float] = {}
    for name, of in told["translations"].items():
        split, kind = name.split()
        hypotheses = [decode(data.tokenizer, torch.tensor([tokens]))[0] for tokens in of["tokens"]]
        scores = all_scores(hypotheses, getattr(data, split).targets, of["nll"])
        metrics |= named({kind: {f"{split}_{score}": value for score, value in scores.items()}}, "last")
    return {
        "study": "fairseq",
        "task": run.task,
        "run": asdict(run),
        "metrics": metrics,
        "bleu_signature": bleu_signature(),
        "epochs_of_models": told["epochs"],
        "curve": told["curve"],
        "seconds": told["seconds"],
        **facts_of(run, data),
        "theirs": told["versions"],
        **environment(multi30k.LIBRARIES),
        "command": f"ORACLE/bin/python recipes/studies/multi30k_fairseq.py FOLDER  # seed {run.seed}, from `write`",
        "hardware": told.get("hardware"),
    }


COMPARED = {
    "test BLEU, best": "test_bleu_best",
    "last": "test_bleu",
    "mean of the last 5": "test_bleu_mean_of_5",
    "tokenised and lower-cased, mean of 5": "test_bleu_tokenised_lowercase_mean_of_5",
    "NLL per token in nats, mean of 5": "test_nll_mean_of_5",
    "NLL per token in bits, mean of 5": "test_nll_bits_mean_of_5",
}


def table(records: Path) -> str:
    """
    Every run of fairseq and AR-Adam at the same learning rate: mean ± standard deviation (runs), and the mean of ours
    minus theirs over the seeds that both have, with its 95 % interval. A table for each rate, where there are several.
    """
    runs = [json.loads(path.read_text()) for path in sorted((records / "multi30k").glob("fairseq_*.json"))]
    rates = sorted({record["run"]["inner_lr"] for record in runs})
    if len(rates) < 2:
        return _table_of(runs, records)
    own = {rate: [record for record in runs if record["run"]["inner_lr"] == rate] for rate in rates}
    return "\n\n".join(f"Learning rate {rate}:\n\n{_table_of(own[rate], records)}" for rate in rates)


def _table_of(theirs: list[dict[str, Any]], records: Path) -> str:
    ours = [found for record in theirs if (found := find_record(run_of(record["run"]), records))]
    lines = ["| test2016 | fairseq | AR-Adam here | ours minus theirs |", "|---|---|---|---|"]
    for words, metric in COMPARED.items():
        sides = ([record["metrics"][metric] for record in side] for side in (theirs, ours))
        cells = [f"{mean_sd(values)} ({len(values)})" if values else "not run" for values in sides]
        lines.append(f"| {words} | {' | '.join(cells)} | {paired_gain(ours, theirs, metric)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
