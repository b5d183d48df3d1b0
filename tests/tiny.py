"""Tiny models and data that tests share."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainerCallback

from harness import patience


class Rows(Dataset):
    """Regression rows, the same on every rank."""

    def __init__(self, rows: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(rows, 4, generator=generator).to(dtype)  # the same values in every dtype
        self.y = torch.randn(rows, 1, generator=generator).to(dtype)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": self.x[index], "labels": self.y[index]}


class Regression(nn.Module):
    """Two layers; the second is a parameter group of its own. Keeps the batches it has seen in training."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.body = nn.Linear(4, 5).to(dtype)
        self.head = nn.Linear(5, 1).to(dtype)
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.training:
            self.seen.append((x.clone(), labels.clone()))
        return {"loss": (self.head(torch.tanh(self.body(x))) - labels).square().mean()}


class LossKeeper(Regression):
    """In fp32; keeps the loss of every pass."""

    def __init__(self) -> None:
        super().__init__(torch.float32)
        self.losses: list[float] = []

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        result = super().forward(x, labels)
        self.losses.append(result["loss"].item())
        return result


def two_groups(model: Regression, name: str, lr: float) -> torch.optim.Optimizer:
    """An optimizer with a learning rate per layer."""
    groups: list[dict[str, Any]] = [
        {"params": list(model.body.parameters()), "lr": lr},
        {"params": list(model.head.parameters()), "lr": lr / 2},
    ]
    if name == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)


class WholeAdam(torch.optim.Adam):
    """An optimizer of one's own: what it needs of a tensor is not known."""


class SeveralInOne(torch.optim.Optimizer):
    """Two optimizers as one, whose state is a merged copy: as Megatron's ChainedOptimizer and many a Muon script."""

    def __init__(self, params):
        first, *others = params
        self.parts = [torch.optim.SGD([first], lr=0.05, momentum=0.9), torch.optim.AdamW(others, lr=0.01)]
        self.defaults = {}

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self):
        return {param: state for part in self.parts for param, state in part.state.items()}

    def step(self, closure=None):
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none=True):
        for part in self.parts:
            part.zero_grad(set_to_none)


def warmup_and_decay(step: int) -> float:
    """0, 1/4, ..., 1, then a linear decay: the first step of a run has learning rate 0."""
    return step / 4 if step < 4 else max(0.1, 1 - (step - 4) / 20)


def bert(dropout: float = 0.0) -> nn.Module:
    """A PreTrainedModel of 10 k parameters with an unused pooler output and tied nothing."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(3)
    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return BertForSequenceClassification(config)


def sentences(rows: int = 64) -> list[dict[str, torch.Tensor]]:
    """Token ids with a label that can be learned."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 32, (rows, 6), generator=generator)
    return [{"input_ids": row, "labels": (row[0] % 2)} for row in ids]


class Hub:
    """Stands for the Hub: an upload is given to `keep`, with its place in the repository, and is done."""

    def __init__(self, keep: Callable[[Path, str | None], Any]) -> None:
        self.keep = keep

    def create_repo(self, name: str, **kwargs: Any) -> SimpleNamespace:
        return SimpleNamespace(repo_id=f"me/{name}", url="")

    def upload_folder(self, folder_path: str, path_in_repo: str | None = None, **kwargs: Any) -> Future[None]:
        self.keep(Path(folder_path), path_in_repo)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def stand_in_for_the_hub(keep: Callable[[Path, str | None], Any]) -> None:
    """Trainer's pushes go to `keep`; transformers 4.57 calls the Hub's functions by name."""
    import transformers.trainer as trainer

    hub = Hub(keep)
    trainer.hf_api = lambda: hub
    for name in ("create_repo", "upload_folder"):
        if hasattr(trainer, name):
            setattr(trainer, name, getattr(hub, name))


def train_node_workers(**settings: Any) -> tuple[Regression, Any]:
    """
    Four steps of workers of two processes under Accelerate, two rounds; the model, and the `SlowMoOptimizer` under its
    wrapper.
    """
    from accelerate import Accelerator

    from slowmo_hf import SlowMoConfig, SlowMoOptimizer

    accelerator, bare, rows = Accelerator(cpu=True), Regression(), Rows(64)
    config = SlowMoConfig(sync_every=2, processes_per_worker=2, timeout_seconds=patience(30), **settings)
    model, optimizer = accelerator.prepare(bare, SlowMoOptimizer(torch.optim.SGD(bare.parameters(), lr=0.1), config))
    for step in range(4):
        start = 16 * step + 4 * torch.distributed.get_rank()
        accelerator.backward(model(rows.x[start : start + 4], rows.y[start : start + 4])["loss"])
        optimizer.step()
        optimizer.zero_grad()
    return bare, optimizer.optimizer


class SmallNorm(nn.Module):
    """A linear layer, BatchNorm and a constant buffer that overflows when it is averaged."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.body = nn.Linear(4, 5)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 1)
        self.register_buffer("floor", torch.full((2,), torch.finfo(torch.float32).min))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.head(self.norm(self.body(x.float()))) - labels.float()).square().mean()}


def arguments(folder: str | Path, **settings: Any) -> Any:
    """TrainingArguments that say and save nothing unless `settings` ask for it."""
    from transformers import TrainingArguments

    return TrainingArguments(str(folder), **{**QUIET, **settings})


QUIET = {
    "per_device_train_batch_size": 4,
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters and buffers, by name."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class Recorder(TrainerCallback):
    """
    What a model held after each inner step (`stepped`), after each whole step (`after`), at each look. Put it before
    SlowMoCallback.
    """

    def __init__(self) -> None:
        self.start: dict[str, torch.Tensor] = {}
        self.stepped: list[dict[str, torch.Tensor]] = []
        self.after: list[dict[str, torch.Tensor]] = []
        self.lrs: list[float] = []
        self.evaluated: dict[int, dict[str, torch.Tensor]] = {}
        self.saved: list[int] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.start, self.stepped, self.after, self.lrs = {}, [], [], []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.start = self.start or values(model)

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.stepped.append(values(model))
        self.lrs.append(optimizer.param_groups[0]["lr"])

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after.append(values(model))

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self.evaluated[state.global_step] = values(model)

    def on_save(self, args, state, control, **kwargs):
        self.saved.append(state.global_step)

    def told(self, trained: list[str]) -> dict[str, Any]:
        """All of it, for the test's own process; `trained` names the trainable parameters."""
        return {**vars(self), "trained": trained}


def recorded(trainer: Any, recorder: Recorder) -> dict[str, Any]:
    """The recording, and the model as training has left it."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    return {**recorder.told(trained), "final": values(model)}


class Heard(logging.Handler):
    """What the package says, line by line, with its level."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append((record.levelname, record.getMessage()))

    def __enter__(self):
        logging.getLogger("slowmo_hf").addHandler(self)
        return self

    def __exit__(self, *error):
        logging.getLogger("slowmo_hf").removeHandler(self)

    def about(self, words, level=None):
        return [line for name, line in self.lines if words in line and level in (None, name)]


def error_of(call, *args, **kwargs):
    """`Type: message` of what the call raises; "" where it raises nothing."""
    try:
        call(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def ends_with_one_line(recipe: Any, shown: str, flags: str, said: str, monkeypatch: Any, capfd: Any) -> None:
    """
    A recipe's `main` with these flags says one line, no traceback and no usage; Python's exit code for a text is 1.
    """
    name = Path(recipe.__file__).name
    monkeypatch.setattr(sys, "argv", [name, *shown.split(), *flags.split()])
    with pytest.raises(SystemExit) as ended:
        recipe.main()
    assert isinstance(ended.value.code, str)
    assert re.match(f"{name}: {said}", ended.value.code), ended.value.code
    assert "\n" not in ended.value.code
    assert "usage" not in capfd.readouterr().err


class OutOfMemoryOnce(Regression):
    """A training forward of the first attempt fails on every rank."""

    def __init__(self, failing: int) -> None:
        super().__init__(torch.float32)
        self.failing, self.forwards = failing, 0

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        self.forwards += self.training
        if self.forwards == self.failing:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return super().forward(x, labels)


def mean(results: list[dict[str, torch.Tensor]], name: str) -> torch.Tensor:
    """The workers' average of one tensor, in float64."""
    return sum(result[name].double() for result in results) / len(results)


def follow(runs: list[dict[str, Any]], config: Any, tolerance: float = 1e-6) -> int:
    """
    Do Algorithm 1's outer loop by hand on what the ranks recorded, and compare: between rounds nothing touches the
    weights, a round gives the anchor that lines 6 to 8 give, and the end is the average. Returns the number of rounds.
    """
    tau, alpha, beta = config.sync_every, config.outer_lr, config.outer_momentum
    steps, rounds = len(runs[0]["after"]), 0
    trained = runs[0]["trained"]
    assert trained
    anchor = {name: runs[0]["start"][name].double() for name in trained}
    shown = {name: runs[0]["start"][name] for name in trained}  # the anchor in the parameters' dtype
    velocity = {name: torch.zeros_like(anchor[name]) for name in trained}
    previous_lr = 0.0
    for run in runs:
        assert len(run["after"]) == len(run["stepped"]) == steps
        for name in trained:
            assert torch.equal(run["start"][name], shown[name]), f"{name} differs at the start"
    for k in range(steps):
        stepped, after = [run["stepped"][k] for run in runs], [run["after"][k] for run in runs]
        if (k + 1) % tau:
            for before_end, at_end in zip(stepped, after, strict=True):
                for name in trained:
                    assert torch.equal(before_end[name], at_end[name]), f"step {k + 1} changed {name}"
            if len(runs) > 1 and runs[0]["lrs"][k]:
                assert any(not torch.equal(after[0][name], after[1][name]) for name in trained), (
                    f"step {k + 1}: the ranks are coupled"
                )
            continue
        rounds += 1
        lr = sum(runs[0]["lrs"][k + 1 - tau : k + 1]) / tau  # the round's
        for name in trained:
            pseudo_grad = shown[name].double() - mean(stepped, name)
            if lr == 0:
                velocity[name] = beta * velocity[name]
                anchor[name] = anchor[name] - alpha * pseudo_grad
            else:
                velocity[name] = beta * (lr / previous_lr if previous_lr else 1.0) * velocity[name] + pseudo_grad
                anchor[name] = anchor[name] - alpha * velocity[name]
            shown[name] = after[0][name]
            for rank, at_end in enumerate(after):
                assert torch.equal(at_end[name], shown[name]), (
                    f"rank {rank}, round {rounds}: {name} differs from rank 0's"
                )
            torch.testing.assert_close(shown[name].double(), anchor[name], rtol=tolerance, atol=tolerance)
        previous_lr = lr or previous_lr
    for name in trained:
        for run in runs:
            assert torch.equal(run["final"][name], runs[0]["final"][name]), f"{name} differs at the end"
        torch.testing.assert_close(
            runs[0]["final"][name].double(),
            mean([run["after"][-1] for run in runs], name),
            rtol=tolerance,
            atol=tolerance,
        )
    return rounds


def message_memory(loop: Any) -> list[torch.Tensor]:
    """What an outer loop keeps for messages, of which none is under way."""
    return [memory for buffers in loop.parts.slow.averages.pool.free for memory in buffers.flat.values()]


def held_back(optimizer):
    """Copies of the residuals of a compressed run, by name."""
    held = optimizer.outer_loop.parts.slow.reduction.saved(agree=False, keep=True).own.tensors
    return {key: part.clone() for key, part in held.items()}


def accumulated(accelerator, model, optimizer, scheduler, rows, batches, size, wrap=None):
    """
    The loop that Accelerate teaches; a turn for every optimizer step, behind it. Each rank has `batches` of `size`
    rows, dealt in turn, and begins anew behind row `wrap`.
    """
    for micro in range(batches):
        start = (micro * accelerator.num_processes + accelerator.process_index) * size % (wrap or len(rows))
        with accelerator.accumulate(model):
            accelerator.backward(model(rows.x[start : start + size], rows.y[start : start + size])["loss"])
            optimizer.step()
            if accelerator.sync_gradients:
                scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            yield
