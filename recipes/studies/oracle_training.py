"""Rows of `oracle.py` on training: schedule, Adam, clipping, updates by each system's Trainer, batches."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import torch
from transformers import MarianMTModel

from studies.oracle_results import Fairseq, digits, row
from translation.tokens import TokenBatches
from translation.train import RecipeTrainingArguments, parse
from translation.trainer import TranslationTrainer

PROCESSES = 64  # of the paper


class FixedBatches(torch.utils.data.Sampler[list[int]]):
    """Batches of rows that were given, in place of `TokenBatches`."""

    def __init__(self, batches: Sequence[list[int]]) -> None:
        self.batches = batches

    def set_epoch(self, epoch: int) -> None:
        """There is one order."""

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


def settings(folder: str, flags: str = "") -> RecipeTrainingArguments:
    """Of the paper's AR-Adam row."""
    shown = f"--preset wmt16 --base all_reduce --outer_momentum 0 --use_cpu 1 --output_dir {folder} --disable_tqdm 1"
    quiet = "--eval_strategy no --save_strategy no --average_checkpoints 1 --logging_strategy no"
    return parse(f"{shown} {quiet} --dataloader_num_workers 0 {flags}".split())[2]


def make_trainer(fairseq: Fairseq, model: MarianMTModel, args: RecipeTrainingArguments) -> TranslationTrainer:
    """The recipe's, on the pairs, in the order that fairseq had them."""
    made = TranslationTrainer(
        model=model,
        args=args,
        train_dataset=datasets.Dataset.from_list(fairseq.pairs),
        max_tokens=3584,
        length_penalty=0.6,
        target_lang="de",
    )
    count, batches = len(fairseq.pairs), []
    for update in range(fairseq.numbers["updates"]):
        start = 12 * update if 12 * update + 12 <= count else 0
        batches += [list(range(start, start + 4)), list(range(start + 4, start + 12))]
    made.token_batches = FixedBatches(batches)
    made.data_collator = fairseq.batch
    return made


def optimizer(fairseq: Fairseq) -> list[dict[str, Any]]:
    """Schedule, Adam, clipping."""
    told = fairseq.tensors["adam"]
    with tempfile.TemporaryDirectory() as folder:
        args = settings(folder)
        trainer = make_trainer(fairseq, fairseq.model("base", fairseq.tensors["base"]["weights"]), args)
        trainer.create_optimizer()
        factor = trainer.create_scheduler(num_training_steps=100_000).lr_lambdas[0]
        made = []
        for update, theirs in fairseq.numbers["schedule"].items():
            ours = args.learning_rate * factor(int(update) - 1)
            far, same = f"{ours:.4g}, there {theirs:.4g}: warm-up starts at 0, not at 1e-7", digits(ours, theirs)
            told_by = {"digits": same} if same >= 6 else {"different": far}
            made.append(row(f"learning rate of update {int(update):,}", **told_by, ours=ours, theirs=theirs))
        kind, chosen = TranslationTrainer.get_optimizer_cls_and_kwargs(args)

    def steps(**others: float) -> list[torch.Tensor]:
        parameter = torch.nn.Parameter(told["start"].clone())
        adam = kind([parameter], **{**chosen, "weight_decay": args.weight_decay, **others})
        seen = []
        for gradient in told["gradients"]:
            parameter.grad = gradient.clone()
            adam.step()
            seen.append(parameter.detach().clone())
        return seen

    def moved(seen: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(seen) - told["start"]

    ours, theirs, size = moved(steps()), moved(told["plain"]), told["scale"]
    far = [
        ((ours - theirs)[-1, at].norm() / theirs[-1, at].norm()).item()
        for at in ((size > least / 3) & (size < least * 3) for least in (1e-3, 1e-5, 1e-7))
    ]
    made.append(
        row(
            f"Adam: {len(ours)} updates, given gradients",
            different="eps is added after the bias correction, there before",
            further=dict(zip(("at 1e-3", "at 1e-5", "at 1e-7"), far, strict=True)),
            digits=digits(moved(steps(eps=1e-30)), moved(told["no eps"])),
            note=" without eps",
        )
    )
    made.append(
        row(
            "Adam: weight decay 0.01 (the paper has none)",
            digits=digits(moved(steps(eps=1e-30, weight_decay=0.01)), moved(told["decay"])),
            note=" without eps",
        )
    )
    clipped = torch.nn.Parameter(told["start"].float())
    clipped.grad = told["gradients"][0].float()
    assert args.max_grad_norm == 0.0
    assert torch.equal(told["unclipped"], clipped.grad)
    torch.nn.utils.clip_grad_norm_([clipped], 0.01)
    made.append(
        row(
            "clipping: off, at --clip-norm 0.0 and max_grad_norm 0",
            digits=digits(clipped.grad, told["clipped"]),
            note=" where it is on",
        )
    )
    return made


def trajectories(fairseq: Fairseq) -> list[dict[str, Any]]:
    """Updates of two micro-batches of unequal size, by each system's own Trainer."""
    found = {}
    for name, flags in (("published", ""), ("aligned", "--adam_epsilon 1e-20")):
        told = fairseq.tensors[name]
        model = fairseq.model("big", told["before"])
        with tempfile.TemporaryDirectory() as folder:
            updates = fairseq.numbers["updates"]
            shown = f"--learning_rate 1e-3 --warmup_steps 10 --gradient_accumulation_steps 2 --max_steps {updates}"
            make_trainer(fairseq, model, settings(folder, f"{shown} {flags}")).train()
        before, after = fairseq.state(told["before"]), fairseq.state(told["after"])
        moved = {
            key: (value.detach() - before[key], after[key] - before[key])
            for key, value in model.named_parameters()
            if value.requires_grad and not key.endswith("k_proj.bias")
        }
        ours, theirs = (torch.cat([both[side].flatten() for both in moved.values()]) for side in (0, 1))
        far = ((ours - theirs).norm() / theirs.norm()).item()
        found[name] = far, min(digits(*both) for both in moved.values())
    return [
        row(
            f"{fairseq.numbers['updates']} updates by each Trainer: change of every parameter",
            different=f"by {found['published'][0]:.1%}, for smoothing (V = 64), eps and warm-up",
            digits=found["aligned"][1],
            note=" without these",
        ),
        row(
            "a local worker's gradient",
            different="divided by its own target tokens, there by the mean over all processes",
        ),
    ]


def batches(fairseq: Fairseq) -> list[dict[str, Any]]:
    """Tokens per update, of the same lengths."""
    lengths = fairseq.tensors["lengths"].numpy()
    ours = TokenBatches(lengths, 3584, world_size=PROCESSES).tokens_per_update()
    theirs = {name: PROCESSES * fairseq.numbers["batches"][name] for name in ("target_tokens", "target_positions")}
    return [
        row(
            "tokens per update: 64 batches of at most 3,584",
            different=f"{ours['target'] / 1000:.0f}k target tokens, there {theirs['target_tokens'] / 1000:.0f}k; "
            f"with padding {ours['target_padded'] / 1000:.0f}k and {theirs['target_positions'] / 1000:.0f}k",
            ours=ours,
            theirs=theirs,
        ),
        row("text", different="raw text, byte-level BPE; there tokenised and cleaned beforehand, BPE of words"),
        row("precision", different="bfloat16 where accelerate is told so, there float16"),
    ]
