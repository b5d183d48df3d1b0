"""
What `round_cost.py` measures: its settings, the models, a round's parts, and three forms of a round's arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from measuring import check_at_least
from slowmo_hf import SlowMoConfig, SlowMoOptimizer

BETA = 0.5
MIB = 2**20
PARTS = {"cpu": ["step", "round", "exchange", "memory"], "cuda": ["arithmetic"]}  # where none are named
ON_ANY_DEVICE = ("arithmetic", "overlap")


@dataclass
class BenchmarkArguments:
    """
    Sizes and repetitions. The defaults are T5-small for rounds (60.5 M parameters, 131 tensors) and a small GPT-2 for
    steps.
    """

    repeats: int = field(default=25, metadata={"help": "Repetitions of every part of a round."})
    step_repeats: int = field(default=200, metadata={"help": "Repetitions of the local step."})
    processes: int = field(default=2, metadata={"help": "Processes, one worker each."})
    d_model: int = field(default=512, metadata={"help": "Width of the T5 that rounds are measured on."})
    layers: int = field(default=6, metadata={"help": "Its layers, in encoder and decoder each."})
    vocab_size: int = field(default=32128, metadata={"help": "Its vocabulary."})
    step_width: int = field(default=256, metadata={"help": "Width of the GPT-2 that the local step is measured on."})
    step_tokens: int = field(default=192, metadata={"help": "Tokens per local step."})
    compute_seconds: float = field(
        default=2.0,
        metadata={
            "help": "Wait that stands in for a step's computation behind OSGP's exchange; 1 Gbit/s sends the T5 in it."
        },
    )
    lean_bucket_bytes: int = field(
        default=25 * MIB, metadata={"help": "The small bucket, in bytes; the large one is the default."}
    )
    parts: list[str] = field(
        default_factory=list,
        metadata={
            "help": "What to measure: step, round, exchange, memory (all four where it is not given); on any device "
            "arithmetic (alone where it is not given and the device is cuda), overlap."
        },
    )
    device: str = field(default="cpu", metadata={"help": "cpu, or cuda: all processes share its first card."})
    copy_bytes: int = field(default=2**30, metadata={"help": "Bytes of the copy that bandwidth is measured with."})
    sync_every: int = field(default=12, metadata={"help": "Steps per round of the part overlap."})
    overlap_steps: int = field(default=8, metadata={"help": "Steps that its round travels behind."})
    link: str = field(
        default="loopback", metadata={"help": "What the processes are joined by, in words, for the record."}
    )
    output: str = field(default="benchmarks/records/round_cost.json", metadata={"help": "The record."})

    def __post_init__(self) -> None:
        if self.device not in PARTS:
            raise ValueError(f"device must be cpu or cuda, got {self.device!r}.")
        check_at_least(1, self, "repeats", "step_repeats", "processes")
        self.parts = self.parts or PARTS[self.device]
        known = [*PARTS["cpu"], *ON_ANY_DEVICE]
        if unknown := [part for part in self.parts if part not in known]:
            raise ValueError(f"parts must be among {', '.join(known)}, got {', '.join(unknown)}. Set --parts.")
        elsewhere = [part for part in self.parts if self.device == "cuda" and part not in ON_ANY_DEVICE]
        if elsewhere:
            raise ValueError(
                f"parts must be among {', '.join(ON_ANY_DEVICE)} with device='cuda', got {', '.join(elsewhere)}. "
                "Measure the others with --device cpu."
            )
        if "arithmetic" in self.parts and self.processes != 1:
            raise ValueError(
                f"processes must be 1 for the part arithmetic, got {self.processes}: others would use the memory "
                "that is timed. Add --processes 1."
            )


# ---- models ----


def round_model(args: BenchmarkArguments, dtype: torch.dtype = torch.float32) -> T5ForConditionalGeneration:
    """A T5 with random weights."""
    config = T5Config(
        d_model=args.d_model,
        d_ff=4 * args.d_model,
        num_layers=args.layers,
        vocab_size=args.vocab_size,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config).to(dtype)


def forward(model: torch.nn.Module) -> None:
    """A forward pass of a few tokens: the first one with gradients starts local training."""
    tokens = torch.ones(1, 4, dtype=torch.long, device=next(model.parameters()).device)
    model(input_ids=tokens, labels=tokens)


def local_training(model: torch.nn.Module, **settings: Any) -> SlowMoOptimizer:
    """Local training of `model`, started; its inner step does nothing, for there are no gradients."""
    optimizer = SlowMoOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), SlowMoConfig(outer_momentum=BETA, **settings)
    )
    forward(model)
    return optimizer


def step_model(args: BenchmarkArguments) -> GPT2LMHeadModel:
    """A small GPT-2 with random weights."""
    return GPT2LMHeadModel(
        GPT2Config(n_embd=args.step_width, n_layer=4, n_head=4, vocab_size=1024, n_positions=64, use_cache=False)
    )


def step_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    return step


# ---- the parts of a round, its arithmetic ----


class Parts:
    """The parts that any round has, on flat memory of its own: what a round is held against."""

    def __init__(self, params: list[torch.Tensor]) -> None:
        self.params = [p.detach().clone() for p in params]
        self.received = [torch.empty_like(p) for p in self.params]
        self.flat = torch.cat([p.view(-1) for p in self.params])
        self.anchor, self.velocity = self.flat.clone(), torch.zeros_like(self.flat)
        self.pieces = list(self.flat.split([p.numel() for p in self.params]))

    def copy_in(self) -> None:
        for piece, param in zip(self.pieces, self.params, strict=True):
            piece.copy_(param.view(-1))

    def all_reduce(self) -> None:
        dist.all_reduce(self.flat)

    def arithmetic(self) -> None:
        self.velocity.mul_(BETA).add_(self.flat)
        self.anchor.sub_(self.velocity)

    def copy_out(self) -> None:
        for piece, received in zip(self.pieces, self.received, strict=True):
            received.view(-1).copy_(piece)

    def calls(self) -> dict[str, Callable[[], None]]:
        return {name: getattr(self, name) for name in ("copy_in", "all_reduce", "arithmetic", "copy_out")}


class Textbook:
    """Lines 7 and 8 of Algorithm 1 as one would write them down, per tensor: each operation makes a new tensor."""

    def __init__(self, averages: list[torch.Tensor], inner_lr: float = 0.1) -> None:
        self.averages = [p.detach().clone() for p in averages]
        self.anchors = [p.clone() for p in self.averages]
        self.momenta = [torch.zeros_like(p) for p in self.averages]
        self.inner_lr = inner_lr

    @torch.no_grad()
    def with_temporaries(self) -> None:
        for index, average in enumerate(self.averages):
            anchor, momentum = self.anchors[index], self.momenta[index]
            momentum = BETA * momentum + (anchor - average) / self.inner_lr
            self.anchors[index] = anchor - self.inner_lr * momentum
            self.momenta[index] = momentum

    @torch.no_grad()
    def in_place(self) -> None:
        """The same in four passes without a temporary, which is how fairscale and torchdistx compute it."""
        for anchor, momentum, average in zip(self.anchors, self.momenta, self.averages, strict=True):
            momentum.mul_(BETA).sub_(average, alpha=1 / self.inner_lr).add_(anchor, alpha=1 / self.inner_lr)
            anchor.sub_(momentum, alpha=self.inner_lr)


def outer_step_of(optimizer: SlowMoOptimizer) -> Callable[[], None]:
    """The package's arithmetic alone: one round's calls of its update, on pseudo-gradients that are already there."""
    assert optimizer.outer_loop is not None
    outer = optimizer.outer_loop.parts.slow.update.optimizer
    moves = [
        (anchor, torch.full_like(anchor, 1e-3), index)
        for index, group in enumerate(outer.param_groups)
        for anchor in group["params"]
    ]

    @torch.no_grad()
    def outer_step() -> None:
        for anchor, pseudo_grad, index in moves:
            outer.update_(anchor, pseudo_grad, index)

    return outer_step
