"""base="all_reduce" without an outer update, the baseline through the same surface: stock training bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from equal_ranks import ACCUMULATION, BATCH, LR, PLAIN, STEPS, trained
from harness import run_workers
from slowmo_hf import (
    SlowMoCallback,
    SlowMoConfig,
    SlowMoOptimizer,
    register_for_checkpointing,
    verify_checkpoint,
)
from tiny import (
    Regression,
    Rows,
    SmallNorm,
    bert,
    equal,
    sentences,
    two_groups,
    values,
)


def same(left, right):
    """Equal in every leaf, bit for bit."""
    if isinstance(left, dict):
        return (
            isinstance(right, dict) and list(left) == list(right) and all(same(left[key], right[key]) for key in left)
        )
    if isinstance(left, (list, tuple)):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    return left == right


# ---- without an outer update: stock training ----


class Tokens(nn.Module):
    """
    Next tokens with a loss that divides by the number of labels it is told, as language models do. Keeps that number.
    """

    def __init__(self):
        super().__init__()
        torch.manual_seed(6)
        self.embedding = nn.Embedding(32, 8)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(8, 32)
        self.told = []

    def forward(self, input_ids, labels, **kwargs):
        items = kwargs.get("num_items_in_batch")
        logits = self.head(self.dropout(self.embedding(input_ids)))
        total = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
        if self.training:
            self.told.append(int(items))
        return {"loss": total / (labels.ne(-100).sum() if items is None else items)}


def texts(rows=160):
    """Rows with 1 to 6 labels that count, so that no two processes have as many."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 32, (rows, 6), generator=generator)
    return [
        {"input_ids": row, "labels": torch.where(torch.arange(6) <= index * 7 % 6, row, -100)}
        for index, row in enumerate(ids)
    ]


class RowsToSlice(Rows):
    def __getitem__(self, index):
        return [self[i] for i in range(len(self))[index]] if isinstance(index, slice) else super().__getitem__(index)


def check_trainer(folder):
    def adamw(wrap):
        return lambda model: wrap(torch.optim.AdamW(model.parameters(), lr=3e-2))

    bert_settings = {
        "save_strategy": "steps",
        "save_steps": 3,
        "load_best_model_at_end": True,
        "lr_scheduler_type": "cosine",
    }
    cases = {
        "bert": (lambda: bert(dropout=0.1), sentences(), bert_settings),
        "tokens": (Tokens, texts(), {"warmup_steps": 2}),
        "norm": (SmallNorm, RowsToSlice(160, torch.float32), {}),
    }
    out = {}
    for name, (model, data, settings) in cases.items():
        pair = [
            (f"{folder}/{name} {kind}", callbacks)
            for kind, callbacks in (("stock", []), ("ours", [SlowMoCallback(PLAIN)]))
        ]
        out[name] = [trained(where, model(), data, callbacks, **settings) for where, callbacks in pair]
        if name == "bert":
            out["resumed"] = [
                trained(where, model(), data, callbacks, resume=f"{where}/checkpoint-6", **settings)
                for where, callbacks in pair
            ]
    wraps = (lambda inner: inner, lambda inner: SlowMoOptimizer(inner, PLAIN))
    out["wrapped"] = [
        trained(f"{folder}/wrapped", bert(dropout=0.1), sentences(), [], optimizer=adamw(wrap)) for wrap in wraps
    ]
    return out


@pytest.mark.slow
def test_trainer_is_stock_bit_for_bit(tmp_path):
    ranks = run_workers(check_trainer, 2, str(tmp_path))
    for out in ranks:
        for name, (stock, ours) in out.items():
            assert len(stock["after"]) == (4 if name == "resumed" else STEPS)
            for part, value in stock.items():
                assert same(ours[part], value), (name, part)
            assert {(backward, hooks, world, tokens) for backward, _, hooks, world, tokens in ours["untouched"]} == {
                (True, 0, 2, True)
            }
            entries = ours["history"]
            assert not [key for entry in entries for key in entry if key.startswith("slowmo/")]
            for word in ("loss", "grad_norm", "eval_loss"):
                assert sum(word in entry for entry in entries) >= 3, (name, word)
            assert max(entry["grad_norm"] for entry in entries if "grad_norm" in entry) > 0.1, "clipping must bite"
    for name in ranks[0]:
        (first, second), exact = [out[name][1]["after"] for out in ranks], name != "norm"
        for left, right in zip(first, second, strict=True):
            parameters = ranks[0][name][1]["trained"]
            assert all(torch.equal(left[p], right[p]) for p in parameters), "DDP keeps all ranks equal"
            assert equal(left, right) == exact, "BatchNorm's own statistics are each rank's, as in stock training"
    told = [out["tokens"][1]["told"] for out in ranks]
    assert told[0] == told[1], "labels are counted over all ranks"
    assert len(set(told[0])) > 1
    for step in (3, 6, 9):
        stock, ours = [
            load_file(f"{tmp_path}/bert {kind}/checkpoint-{step}/model.safetensors") for kind in ("stock", "ours")
        ]
        assert equal(stock, ours)


class Dropped(Regression):
    def __init__(self, dtype=torch.float32):
        super().__init__(dtype)
        self.dropout = nn.Dropout(0.2)
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x, labels):
        return {"loss": (self.head(self.dropout(self.norm(torch.tanh(self.body(x))))) - labels).square().mean()}


def looped(wrap):
    """
    A custom loop with accumulation, clipping, AcceleratedScheduler, two groups, dropout, and an evaluation after every
    other step.
    """
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION)
    bare, rows = Dropped(), Rows(200, torch.float32)
    optimizer = wrap(two_groups(bare, "adamw", 0.05))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (1 + k))
    model, optimizer, scheduler = accelerator.prepare(bare, optimizer, scheduler)
    told, world = [], dist.get_world_size()
    torch.manual_seed(dist.get_rank())
    for micro in range(STEPS * ACCUMULATION):
        start = (micro * world + dist.get_rank()) * 4
        with accelerator.accumulate(model):
            loss = model(rows.x[start : start + 4], rows.y[start : start + 4])["loss"]
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(model.parameters(), 0.1) if accelerator.sync_gradients else None
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        told.append((loss.item(), norm, scheduler.get_last_lr(), values(bare)))
        if micro % 4 == 3:
            model.eval()
            with torch.no_grad():
                told.append((model(rows.x[:8], rows.y[:8])["loss"].item(), torch.rand(1)))
            model.train()
    state = optimizer.state_dict()
    state.pop("slowmo", None)
    flags = (model.require_backward_grad_sync, model.require_forward_param_sync, len(model._forward_pre_hooks))
    return told, copy.deepcopy(state), flags


def check_accelerate():
    return looped(lambda inner: inner), looped(lambda inner: SlowMoOptimizer(inner, PLAIN))


def test_accelerate_is_stock_bit_for_bit():
    ranks = run_workers(check_accelerate, 2)
    for (stock, stock_state, stock_flags), (ours, our_state, flags) in ranks:
        assert same(stock, ours)
        assert same(stock_state, our_state)
        assert flags == stock_flags
    ends = [ours[-2][3] for _, (ours, _, _) in ranks]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0] if "running" not in name)
    assert not same(ranks[0][1][0], ranks[1][1][0]), "the ranks have losses of their own"


# ---- saving anywhere: all ranks are equal at every step ----


SLOW_MAINTAINED = SlowMoConfig(base="all_reduce", sync_every=4, inner_state="maintain")


def _loop(folder=None, save_at=None, load_at=0, config=SLOW_MAINTAINED, inner="sgd", prepares=True):
    accelerator, bare, rows = Accelerator(cpu=True), Regression(), Rows(100)
    optimizer = SlowMoOptimizer(two_groups(bare, inner, LR), config)
    if prepares:
        model, optimizer = accelerator.prepare(bare, optimizer)
    else:
        model = nn.parallel.DistributedDataParallel(bare)
        accelerator.register_for_checkpointing(bare)
    register_for_checkpointing(accelerator, optimizer)
    if load_at:
        accelerator.load_state(folder)
    after = []
    for step in range(load_at, 11):
        start = (step * dist.get_world_size() + dist.get_rank()) * BATCH
        accelerator.backward(model(rows.x[start : start + BATCH], rows.y[start : start + BATCH])["loss"])
        optimizer.step()
        optimizer.zero_grad()
        after.append(values(bare))
        if step + 1 == save_at:
            accelerator.save_state(folder)
    return after


def check_accelerate_saves(folder):
    out = {}
    for save_at in (4, 6, 7):  # a round's end, inside, a round's last step but one
        out[save_at] = (_loop(f"{folder}/{save_at}", save_at=save_at), _loop(f"{folder}/{save_at}", load_at=save_at))
    return out


def test_a_state_saved_inside_a_round_continues_bit_for_bit(tmp_path):
    for out in run_workers(check_accelerate_saves, 2, str(tmp_path)):
        for save_at, (through, resumed) in out.items():
            for step, (left, right) in enumerate(zip(through[save_at:], resumed, strict=True), start=save_at + 1):
                assert equal(left, right), f"saved at step {save_at}, sync_every 4: step {step} differs"


def check_plain_saves(folder):
    out = []
    for prepares in (True, False):
        plain = {"config": PLAIN, "inner": "adamw", "prepares": prepares}
        through = _loop(f"{folder}/{prepares}", save_at=4, **plain)
        out.append((through[4:], _loop(f"{folder}/{prepares}", load_at=4, **plain)))
    return out


def test_plain_all_reduce_goes_on_from_what_holds_its_optimizer(tmp_path):
    """Accelerate's own files where it has prepared the optimizer; ours, with a manifest, where it was registered."""
    for runs in run_workers(check_plain_saves, 2, str(tmp_path)):
        for through, resumed in runs:
            assert all(equal(left, right) for left, right in zip(through, resumed, strict=True))
    assert not (tmp_path / "True" / "slowmo").exists()
    verify_checkpoint(tmp_path / "False")


# ---- what makes no sense is refused ----


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"processes_per_worker": 2},
            r"processes_per_worker='2' needs base='local_sgd' or .*, got base='all_reduce': .* train alone",
        ),
        (
            {"processes_per_worker": "node"},
            r"processes_per_worker='node' needs base='local_sgd' or .*, got base='all_reduce': .* train alone",
        ),
        (
            {"topology": "ring"},
            r"topology='ring' needs base='sgp' or base='osgp' or base='dpsgd', got base='all_reduce'",
        ),
        ({"peers": 2}, r"peers=2 needs base='sgp' .*Leave peers at 1, or"),
        (
            {"staleness": 0},
            r"staleness=0 needs base='osgp', got base='all_reduce'.*Leave staleness at 1, or",
        ),
        ({"exact_average": False}, r"exact_average=False needs base='sgp' .*Leave exact_average at True, or"),
        (
            {"inner_state": "average"},
            r"inner_state='average' needs a round that averages parameters, got base='all_reduce'",
        ),
        (
            {"inner_state": "reset", "outer_momentum": 0},
            r"inner_state='reset' needs a round that changes parameters, got base='all_reduce'",
        ),
    ],
)
def test_settings_of_other_bases_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        SlowMoConfig(base="all_reduce", **settings)
