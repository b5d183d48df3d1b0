"""The Trainer of `translation.py`: batches of tokens, and an evaluation that gives BLEU and the exact NLL."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import broadcast, broadcast_object_list
from transformers import EvalPrediction, Seq2SeqTrainer

from translation.judged import all_scores, choose, with_bits
from translation.model import decode, generate, load_state, mean_of_states, sentence_nll, smoothed_loss
from translation.tokens import NO_LABEL, TokenBatches, collate, token_counts


class TranslationTrainer(Seq2SeqTrainer):
    """
    `Seq2SeqTrainer` for encoded rows (`translation_tokens.encode`), with batches of tokens; its evaluation gives BLEU
    against the raw references and the exact NLL per token.

    Args:
        max_tokens (`int`): Tokens of a batch, see `make_batches`.
        length_penalty (`float`): See `generate`.
        target_lang (`str`): Whose tokens Moses splits for the compound-split BLEU.
        settings: As of `Seq2SeqTrainer`; `processing_class` is the tokenizer.
    """

    def __init__(self, *, max_tokens: int, length_penalty: float, target_lang: str, **settings: Any) -> None:
        args = settings["args"]
        loss = partial(smoothed_loss, label_smoothing=args.label_smoothing_factor)
        super().__init__(data_collator=collate, compute_loss_func=loss, compute_metrics=self.scores, **settings)
        self.length_penalty, self.target_lang = length_penalty, target_lang
        self.references: list[str] = []
        seed = args.seed if args.data_seed is None else args.data_seed
        lengths = token_counts(self.train_dataset)
        self.token_batches = TokenBatches(
            lengths, max_tokens, seed=seed, rank=args.process_index, world_size=args.world_size
        )

    def get_train_dataloader(self) -> torch.utils.data.DataLoader[Any]:
        """This rank's batches; told that there is one process, Accelerate does not divide them again."""
        args = self.args
        loader = torch.utils.data.DataLoader(
            self.train_dataset.select_columns(["input_ids", "labels"]),
            batch_sampler=self.token_batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return prepare_data_loader(loader, args.device, num_processes=1, process_index=0, put_on_device=True)

    def saves_every(self) -> int:
        """
        After `train()`, optimizer steps between two checkpoints in turn; others are of a stop in between. 1: there is
        no turn.
        """
        if self.args.save_strategy == "steps":
            return int(self.state.save_steps)
        if self.args.save_strategy == "epoch":
            return math.ceil(len(self.token_batches) / self.args.gradient_accumulation_steps)
        return 1

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """
        Trainer's own; losses, which are in nats, in bits too, and beside one of training how many target tokens an
        update holds, over all processes.
        """
        logs.update(with_bits(logs))
        if "loss" in logs:
            held = self.token_batches.tokens_per_update(self.args.gradient_accumulation_steps)
            told = {"tokens_per_update": held["target"], "tokens_per_update_padded": held["target_padded"]}
            logs = {**logs, **told}
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, dataloader: torch.utils.data.DataLoader[Any], *args: Any, **kwargs: Any) -> Any:
        """
        Trainer's own, which gathers in the rows' order. Seq2SeqTrainer has just asked for all that the ranks have:
        then the rows that fill up the last batches would be scored twice.
        """
        self.gather_function = self.accelerator.gather_for_metrics
        self.references = dataloader.dataset["target"][:]
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None, **kwargs: Any
    ) -> Any:
        """
        Tokens of the translations, and each sentence's NLL; no loss, which Trainer would average over batches of
        unequal weight.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            nll = sentence_nll(self.model, inputs)
            num_beams = self._gen_kwargs.get("num_beams") or 1
            tokens = generate(
                self.model, inputs["input_ids"], inputs["attention_mask"], num_beams, self.length_penalty
            )
        return None, (tokens, nll), inputs["labels"]

    def scores(self, prediction: EvalPrediction) -> dict[str, float]:
        """`compute_metrics`: `all_scores`."""
        tokens, nll = prediction.predictions
        texts = decode(self.processing_class, tokens)
        nll = float(nll.astype(np.float64).sum() / (prediction.label_ids != NO_LABEL).sum())
        return all_scores(texts, self.references, nll, self.target_lang)


def checkpoints_of_others(output_dir: str, resumed: str | None) -> dict[Path, int]:
    """
    What lies in the output folder before training and is of no part of this run, each with the time when it was
    written: this run may write one of the same name.

    Args:
        resumed (`str`, *optional*): The checkpoint that is gone on from; those before it are of this run.
    """
    before = [] if resumed is None else _checkpoints(Path(resumed).parent)
    ours = {path.resolve() for path in before if _step(path) <= _step(Path(resumed or ""))}
    return {path: _written(path) for path in _checkpoints(Path(output_dir)) if path.resolve() not in ours}


class RunModels:
    """
    The models of a run that is over, by optimizer steps: its checkpoints, the workers' average each, and the end of
    training, which is in the Trainer. Rank 0 reads and decides, for only its machine is sure to have the files; all
    ranks do the same at the same time.

    Args:
        trainer (`TranslationTrainer`): After `train()`. What it saved out of turn before its end, as a signal makes
            it, is left out: then the last five are five epochs' ends in every run.
        average (`int`): The model that is saved is the mean of this many last ones; 1: what the Trainer holds.
        others (`Mapping[Path, int]`): See `checkpoints_of_others`.

    Attributes:
        chosen (`dict[str, list[int]]`): By kind of model (`choose`, and `saved`), the steps of what it is the mean of.
    """

    def __init__(self, trainer: TranslationTrainer, average: int, others: Mapping[Path, int]) -> None:
        self.trainer = trainer
        whole = not any(hasattr(parameter, "full_tensor") for parameter in trainer.model.parameters())
        # Into a model that is divided over processes no file is loaded: there is its end alone.
        found = _checkpoints(Path(trainer.args.output_dir)) if whole else []
        ours = {_step(path): path for path in found if others.get(path) != _written(path)}
        state, every = trainer.state, trainer.saves_every()
        self.folders = {step: path for step, path in ours.items() if step % every == 0 or step == state.global_step}
        best = state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
        held = _step(Path(best)) if best else state.global_step
        nll = {entry["step"]: entry["eval_nll"] for entry in state.log_history if "eval_nll" in entry}
        steps = sorted({*self.folders, held})
        saved = [held] if average == 1 else steps[-average:]
        chosen = {**choose({step: nll.get(step) for step in steps}), "saved": saved}
        self.chosen: dict[str, list[int]]
        self.held: int
        self.chosen, self.held = broadcast_object_list([chosen, held])
        self.inside = [self.held]
        self.values: dict[str, torch.Tensor] = {}
        if trainer.is_world_process_zero() and any(made_of != self.inside for made_of in self.chosen.values()):
            self.values = {name: value.cpu().clone() for name, value in trainer.model.state_dict().items()}

    def put(self, steps: list[int]) -> None:
        """Put the mean of these steps' models into the Trainer's, on every rank."""
        if steps == self.inside:
            return
        if self.trainer.is_world_process_zero():
            states = (self.values if step == self.held else load_state(self.folders[step]) for step in steps)
            self.trainer.model.load_state_dict(mean_of_states(states))
        for tensor in self.trainer.model.state_dict().values():
            broadcast(tensor, from_process=0)
        self.inside = steps


def _checkpoints(folder: Path) -> list[Path]:
    """Those that hold a whole model."""
    found = [path.parent for path in folder.glob("checkpoint-*/config.json")]
    return [path for path in found if _step(path) >= 0 and any(path.glob("model*.safetensors"))]


def _step(checkpoint: Path) -> int:
    """-1 for a folder of another name."""
    digits = checkpoint.name.removeprefix("checkpoint-")
    return int(digits) if digits.isdigit() else -1


def _written(checkpoint: Path) -> int:
    state = checkpoint / "trainer_state.json"
    return (state if state.is_file() else checkpoint / "config.json").stat().st_mtime_ns
