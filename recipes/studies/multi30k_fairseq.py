"""
The half of `multi30k_oracle.py` that runs fairseq 0.12.2: it trains its own Transformer on the tokens and the batches
that the other half wrote, and translates. `oracle_fairseq.py` says how to make its environment:

    ORACLE/bin/python recipes/studies/multi30k_fairseq.py FOLDER

A run that is cut off goes on from its last epoch's end. What another run has left in FOLDER is refused.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from oracle_fairseq import (  # makes fairseq run on this Python
    Dictionary,
    Trainer,
    convert_namespace_to_omegaconf,
    options,
    parts,
    sample_of,
    versions,
)
from same_run import OtherRunError, check_same_run, identity

MEAN_OF = 5


def main() -> None:
    """Write `translations.pt`."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="that multi30k_oracle.py wrote")
    folder = parser.parse_args().folder
    if not (folder / "given.pt").exists():
        said = f"folder must hold given.pt, written by multi30k_oracle.py write, got {str(folder)!r}. Give another."
        sys.exit(f"{Path(__file__).name}: {said}")
    given = torch.load(folder / "given.pt", weights_only=True)
    run = Run(given, folder)
    try:
        run.train()
        translations = run.translate()
    except OtherRunError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
    told = {"translations": translations, "curve": run.curve, "seconds": run.seconds, "versions": versions()}
    told["hardware"] = f"{os.cpu_count()} CPU cores, {platform.machine()}, one core per run"
    torch.save({**told, "epochs": run.epochs_of_models(), "identity": run.identity}, folder / "translations.pt")
    print(f"written to {folder / 'translations.pt'}")


def settings(given: dict[str, Any]) -> Any:
    """fairseq's configuration of the same run."""
    shape, run = given["shape"], given["run"]
    sides = [
        f"--{side}-{flag}={shape[ours]}"
        for side in ("encoder", "decoder")
        for flag, ours in (
            *(("embed-dim", "d_model"), ("ffn-embed-dim", "ffn")),
            *(("attention-heads", "heads"), ("layers", "layers")),
        )
    ]
    line = f"""
        nowhere --arch transformer --share-all-embeddings --dropout {shape["dropout"]} --cpu --seed {run["seed"]}
        --optimizer adam --adam-betas (0.9,0.98) --clip-norm 0.0 --weight-decay 0.0 --lr {run["inner_lr"]}
        --lr-scheduler inverse_sqrt --warmup-init-lr 0 --warmup-updates {given["warmup_updates"]}
        --criterion label_smoothed_cross_entropy --label-smoothing {given["label_smoothing"]}
    """
    parser = options.get_training_parser(default_task="translation")
    return convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, [*line.split(), *sides]))


class Run:
    """
    One run of fairseq's Trainer.

    Args:
        given (`dict[str, Any]`): What the other half wrote.
        folder (`Path`): For its states.
    """

    def __init__(self, given: dict[str, Any], folder: Path) -> None:
        self.given, self.folder, self.identity = given, folder, identity(given)
        self.words = Dictionary()
        for symbol in range(given["vocabulary"] - 2):  # ours has <pad> and </s>
            self.words.add_symbol(f"w{symbol}")
        to_theirs = [self.words.pad(), self.words.eos(), *range(self.words.nspecial, len(self.words))]
        self.to_ours = {theirs: ours for ours, theirs in enumerate(to_theirs)}
        self.sets = {
            name: [tuple([to_theirs[token] for token in side] for side in pair) for pair in given[name]]
            for name in ("train", "validation", "test")
        }
        torch.manual_seed(given["run"]["seed"])
        config = settings(given)
        self.task, self.model, criterion = parts(config, self.words)
        for module in self.model.encoder.layers:
            module.ever_training = True  # else it would take a fused kernel that torch's masks no longer fit
        self.trainer = Trainer(config, self.task, self.model, criterion)
        self.curve: list[dict[str, float]] = []
        self.seconds = 0.0

    def train(self) -> None:
        """All epochs that are left."""
        states = sorted(self.folder.glob("state*.pt"), key=_epoch)
        if states:
            self._take_up(self._state(states[-1]))
        for epoch in range(len(self.curve), len(self.given["epochs"])):
            start = time.perf_counter()
            self.trainer.begin_epoch(epoch + 1)
            for update in self.given["epochs"][epoch]:
                batches = [[self.sets["train"][row] for row in rows] for rows in update]
                self.trainer.train_step([sample_of(rows, self.words) for rows in batches])
            nll = self.nll("validation")
            self.seconds += time.perf_counter() - start
            self.curve.append({"epoch": epoch + 1, "validation_nll": nll})
            print(f"epoch {epoch + 1}: validation NLL {nll:.4f} nats, {self.seconds:.0f} s", flush=True)
            self._keep(epoch + 1)

    def _state(self, path: Path) -> dict[str, Any]:
        state: dict[str, Any] = torch.load(path, weights_only=False)
        check_same_run(state.get("identity"), self.identity, path)
        return state

    def _take_up(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.trainer.optimizer.optimizer.load_state_dict(state["optimizer"])
        self.curve, self.seconds = state["curve"], state["seconds"]
        self.trainer.set_num_updates(sum(len(epoch) for epoch in self.given["epochs"][: len(self.curve)]))

    def _keep(self, epoch: int) -> None:
        state = {"model": self.model.state_dict(), "optimizer": self.trainer.optimizer.optimizer.state_dict()}
        beside = self.folder / "beside.part"
        torch.save({**state, "curve": self.curve, "seconds": self.seconds, "identity": self.identity}, beside)
        beside.replace(self.folder / f"state{epoch}.pt")
        wanted = {epoch for epochs in self.epochs_of_models().values() for epoch in epochs}
        for path in self.folder.glob("state*.pt"):
            if _epoch(path) not in wanted:
                path.unlink()

    def epochs_of_models(self) -> dict[str, list[int]]:
        """The best by validation NLL, the last, and the last five."""
        best = min(self.curve, key=lambda look: look["validation_nll"])["epoch"]
        last = len(self.curve)
        return {
            "best": [int(best)],
            "last": [last],
            f"mean_of_{MEAN_OF}": list(range(max(1, last - MEAN_OF + 1), last + 1)),
        }

    @torch.no_grad()
    def nll(self, name: str) -> float:
        """Per token, its end included, in nats."""
        self.model.eval()
        total, tokens = 0.0, 0
        for start in range(0, len(self.sets[name]), 100):
            sample = sample_of(self.sets[name][start : start + 100], self.words)
            log_p = self.model.get_normalized_probs(self.model(**sample["net_input"]), log_probs=True)
            found = log_p.gather(2, sample["target"][:, :, None])[:, :, 0]
            total -= float(found[sample["target"] != self.words.pad()].double().sum())
            tokens += sample["ntokens"]
        self.model.train()
        return total / tokens

    def translate(self) -> dict[str, dict[str, Any]]:
        """Tokens, in our ids, and the NLL of every model on both sets."""
        given = self.given
        search = Namespace(beam=given["num_beams"], lenpen=given["length_penalty"], max_len_a=1, max_len_b=48)
        told: dict[str, dict[str, Any]] = {}
        for kind, epochs in self.epochs_of_models().items():
            states = [self._state(self.folder / f"state{epoch}.pt")["model"] for epoch in epochs]
            mean = {
                name: torch.stack([state[name].double() for state in states]).mean(0).to(value.dtype)
                for name, value in states[-1].items()
            }
            self.model.load_state_dict(mean)
            for name in ("validation", "test"):
                told[f"{name} {kind}"] = {"tokens": self._beams(name, search), "nll": self.nll(name)}
        return told

    def _beams(self, name: str, search: Namespace) -> list[list[int]]:
        self.model.eval()
        generator = self.task.build_generator([self.model], search)
        rows = self.sets[name]
        order = sorted(range(len(rows)), key=lambda row: len(rows[row][0]))
        found: list[list[int]] = [[] for _ in rows]
        for start in range(0, len(order), 64):
            some = order[start : start + 64]
            sample = sample_of([rows[row] for row in some], self.words)
            for place, beams in zip(sample["id"].tolist(), generator.generate([self.model], sample), strict=True):
                found[some[place]] = [self.to_ours[token] for token in beams[0]["tokens"].tolist()]
        self.model.train()
        return found


def _epoch(path: Path) -> int:
    return int(path.stem.removeprefix("state"))


if __name__ == "__main__":
    main()
