"""Runs with `base="all_reduce"`, where all ranks are equal at every step."""

from __future__ import annotations

import copy

import torch.distributed as dist
from transformers import Trainer, TrainerCallback

from harness import patience
from slowmo_hf import (
    SlowMoConfig,
)
from tiny import (
    Recorder,
    arguments,
    recorded,
)

STEPS, ACCUMULATION = 10, 2
PLAIN = SlowMoConfig(base="all_reduce", outer_momentum=0, sync_every=3, timeout_seconds=patience(30))


class Untouched(TrainerCallback):
    """What local training would change: DDP's flags, hooks and process group, and Trainer's token average."""

    def __init__(self):
        self.trainer, self.seen = None, set()

    def _look(self, args, **kwargs):
        ddp = self.trainer.model_wrapped
        flags = (ddp.require_backward_grad_sync, ddp.require_forward_param_sync, len(ddp._forward_pre_hooks))
        self.seen.add((*flags, dist.get_world_size(ddp.process_group), args.average_tokens_across_devices))

    def on_step_begin(self, args, state, control, **kwargs):
        self._look(args)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._look(args)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._look(args)


def timeless(history):
    return [{k: v for k, v in entry.items() if not k.endswith(("_runtime", "_per_second"))} for entry in history]


def trained(folder, model, data, callbacks, *, optimizer=None, resume=None, **settings):
    """Everything that a Trainer run leaves, but times."""
    recorder, untouched = Recorder(), Untouched()
    settings = {
        "max_steps": STEPS,
        "learning_rate": 3e-2,
        "gradient_accumulation_steps": ACCUMULATION,
        "max_grad_norm": 0.1,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "logging_strategy": "steps",
        "logging_steps": 2,
        **settings,
    }
    trainer = Trainer(
        model=model,
        args=arguments(folder, **settings),
        train_dataset=data,
        eval_dataset=data[:8],
        optimizers=(optimizer(model) if optimizer else None, None),
        callbacks=[recorder, untouched, *callbacks],
    )
    untouched.trainer = trainer
    trainer.train(resume_from_checkpoint=resume)
    state = trainer.optimizer.state_dict()
    state.pop("slowmo", None)
    return {
        **recorded(trainer, recorder),
        "optimizer": copy.deepcopy(state),
        "lr": trainer.lr_scheduler.get_last_lr(),
        "history": timeless(trainer.state.log_history),
        "untouched": untouched.seen,
        "told": getattr(model, "told", None),
        "best": trainer.state.best_metric,
    }


LR, BATCH = 0.05, 3
