"""The Trainer of `translation.py`: batches of tokens, and an evaluation that gives BLEU and the exact NLL."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import broadcast
from transformers import EvalPrediction, Seq2SeqTrainer

from translation.bleu import bleu, compound_split_bleu
from translation.model import average_checkpoints, decode, generate, sentence_nll, smoothed_loss
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

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's own; beside a loss, how many target tokens an update holds, over all processes."""
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
        """`compute_metrics`: BLEU in percent, NLL per token, `</s>` included: in nats, and in bits as fairseq's."""
        tokens, nll = prediction.predictions
        texts = decode(self.processing_class, tokens)
        nll = float(nll.astype(np.float64).sum() / (prediction.label_ids != NO_LABEL).sum())
        return {
            "bleu": bleu(texts, self.references)["score"],
            "bleu_compound_split": compound_split_bleu(texts, self.references, self.target_lang),
            "nll": nll,
            "nll_bits": nll / math.log(2),
        }


def average_last(trainer: TranslationTrainer, count: int) -> int:
    """
    Put the mean of the last `count` checkpoints into the model, on every rank; rank 0 reads them, for only its machine
    is sure to have them. Returns how many there were, on rank 0; 1 leaves the model as it is.
    """
    if count == 1:
        return 1
    steps = sorted(int(path.name.split("-")[1]) for path in Path(trainer.args.output_dir).glob("checkpoint-*[0-9]"))
    folders = [Path(trainer.args.output_dir) / f"checkpoint-{step}" for step in steps[-count:]]
    if trainer.is_world_process_zero() and folders:
        trainer.model.load_state_dict(average_checkpoints(folders))
    for tensor in trainer.model.state_dict().values():
        broadcast(tensor, from_process=0)
    return len(folders)
