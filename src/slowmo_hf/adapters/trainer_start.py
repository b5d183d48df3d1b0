"""What is checked, switched off and said when a Trainer starts to train."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher
from accelerate.state import PartialState
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from .. import upstream
from ..dtensors import sharded_modules
from ..log import logger
from ..training.parts import Parts
from ..training.program import Program
from ..training.written import LoadedSettings
from ..wire.job import processes_in_job
from ..wire.roll_call import begun, told_of
from .refusals import refuse_schedule_free
from .trainer_checkpoints import set_aside_unfinished
from .trainer_methods import callback_of, given_back_of


def raw_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Behind Accelerate's wrapper. A SlowMoOptimizer there would mean two outer loops over one model."""
    raw = getattr(optimizer, "optimizer", optimizer)
    if hasattr(raw, "outer_loop"):
        raise ValueError("the Trainer's optimizer is a SlowMoOptimizer: use it or SlowMoCallback, not both.")
    if not isinstance(raw, torch.optim.Optimizer):
        refuse_schedule_free(raw)
        raise TypeError(f"the Trainer's optimizer must be a torch.optim.Optimizer, got {type(raw).__name__}.")
    return raw


def refuse_shared(callbacks: list[Any], training: Trainer | None, waiting: list[Trainer]) -> None:
    """
    Refuse two outer loops over one model, and one outer loop over two models that train at once.

    Args:
        callbacks (`list`): The SlowMoCallbacks of the Trainer that begins.
        training (`Trainer`, *optional*): The one that the callback has begun with, and not ended.
        waiting (`list`): The Trainers inside whose training this one begins.

    Raises:
        ValueError: There are several of the first, or the second is among the third.
    """
    if len(callbacks) > 1:
        names = ", ".join(type(callback).__name__ for callback in callbacks)
        raise ValueError(
            f"a Trainer takes one SlowMoCallback, got {len(callbacks)} ({names}): each would average and move the "
            "same model. Keep one of them; trainer.remove_callback takes another out."
        )
    if any(training is trainer for trainer in waiting):
        raise ValueError(
            "one SlowMoCallback was given to two Trainers that train at once, one inside the other: give each Trainer "
            "a SlowMoCallback of its own."
        )


def refuse_wrong_launch(args: TrainingArguments, wrappers: list[Any]) -> None:
    """
    Refuse a launch in which every process would train on all data, or in which it is unknown who averages gradients.

    Args:
        wrappers (`list`): The model's, of `DistributedDataParallel`, or its modules that FSDP2 shards.
    """
    if args.world_size != processes_in_job():
        raise RuntimeError(
            f"torch.distributed has {processes_in_job()} processes, but TrainingArguments.world_size is "
            f"{args.world_size}: every process would train on all data. On CPU, set use_cpu=True or "
            "ACCELERATE_USE_CPU=true (docs/launch.md)."
        )
    if args.world_size > 1 and not wrappers:
        raise RuntimeError(
            f"world_size is {args.world_size}, but no DistributedDataParallel wrapper of the model was found, so "
            "it is unknown who averages gradients. Launch with torchrun or accelerate launch."
        )


def program_of(args: TrainingArguments) -> Program:
    """What all ranks compare of these arguments."""
    return Program(
        accumulation=args.gradient_accumulation_steps,
        batch_size=args.per_device_train_batch_size,
        must_agree=(("max_grad_norm", args.max_grad_norm),),
    )


def refuse_resumable_saves(args: TrainingArguments, model: Any) -> None:
    """
    Refuse checkpoints to be resumed of a model that `from_pretrained(distributed_config=...)` has sharded: Trainer
    writes rank 0's shard of its optimizer alone. transformers 5.24 refuses it where the Trainer is made; arguments may
    have changed since.
    """
    if (
        getattr(model, "is_distributed_loading_by_transformers", False)
        and args.save_strategy != "no"
        and not args.save_only_model
    ):
        raise ValueError(
            f"save_strategy={str(getattr(args.save_strategy, 'value', args.save_strategy))!r} with save_only_model="
            "False saves checkpoints to be resumed, and Trainer cannot save the optimizer of a model that was sharded "
            "at load (DistributedConfig). Use save_strategy='no' or save_only_model=True, or load the model whole and "
            "shard it by accelerate's FSDP2 (fsdp=True, fsdp_config={'version': 2})."
        )


def _begun_and_ended(train: Callable[..., Any]) -> Callable[..., Any]:
    """
    `Trainer.train` of one that has our callback: it begins with whole checkpoints alone, also where the callback came
    after the Trainer was made, and with a model that DDP may wrap, also behind an evaluation. Where it raises, the
    Trainer, its arguments and its model's wrapper are as they were: ranks may have failed at different steps, and a
    save then needs nobody, as with a stock Trainer.
    """

    @functools.wraps(train)
    def begun_and_ended(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        if callback_of(self) is None:
            return train(self, *args, **kwargs)

        def begin_and_train() -> Any:
            job: Any = PartialState()
            job.wait_for_everyone()  # for what others still save
            set_aside_unfinished(self.args)
            job.wait_for_everyone()
            if self.args.world_size > 1 and _is_whole(self):
                upstream.forget_evaluation(self)
            return train(self, *args, **kwargs)

        try:
            return _told(self, begin_and_train)
        except BaseException:
            given_back_of(self).close()
            _tell_of_local_weights(self)
            raise

    return begun_and_ended


def _tell_of_local_weights(trainer: Trainer) -> None:
    """What a program that catches the error saves, or trains on, is rank 0's own."""
    ours = callback_of(trainer)
    loop = None if ours is None else ours.outer_loop
    if loop is not None and loop.parts.trains_alone and not (loop.clock.workers_agree or loop.clock.is_over):
        loop.workers.logger.warning(
            "training stopped at step %d, %d steps after the last round: the model is each rank's own now, not the "
            "average. Go on from the last checkpoint; what is saved or trained from here is rank 0's.",
            loop.clock.attempted_steps,
            loop.clock.local_steps,
        )


def _is_whole(trainer: Trainer) -> bool:
    """Whether the model waits for DDP: it is neither wrapped nor sharded."""
    model = trainer.model
    return model is not None and not isinstance(model, DistributedDataParallel) and not sharded_modules([model])


def _told(trainer: Trainer, train: Callable[[], Any]) -> Any:
    """What it returns; what it raises, perhaps to be caught, is told to the others at once."""
    since = begun()
    try:
        return train()
    except BaseException as error:
        ours = callback_of(trainer)
        named = error if ours is None else told_of(error, since, ours.config.timeout_seconds)
        try:
            if named is not error:
                raise named from error
            raise
        finally:
            del named  # it holds this frame, and with it the Trainer


def _each_told(run: Callable[..., Any]) -> Callable[..., Any]:
    """`Trainer._inner_training_loop`, of which `auto_find_batch_size` begins several in one `train`."""

    @functools.wraps(run)
    def told(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        return _told(self, functools.partial(run, self, *args, **kwargs))

    return told


_loaded: weakref.WeakKeyDictionary[CallbackHandler, LoadedSettings] = weakref.WeakKeyDictionary()


def _loaded_by(trainer_has: Any, *optimizers: Any) -> LoadedSettings | None:
    """None where no worker's own state is to come, behind all that the program sets: without rounds of ours."""
    ours = callback_of(SimpleNamespace(callback_handler=getattr(trainer_has, "callback_handler", trainer_has)))
    if ours is None or not ours.config.has_rounds:
        return None
    return LoadedSettings([raw_optimizer(one) for one in optimizers], {"scheduler": trainer_has.lr_scheduler})


def _noted(load: Callable[..., Any]) -> Callable[..., Any]:
    """Trainer's own load of the optimizer. What a subclass sets behind it stays, as in a stock run."""

    @functools.wraps(load)
    def load_and_note(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        result = load(self, *args, **kwargs)
        is_a_checkpoint = any(given is not None for given in (*args, *kwargs.values()))
        noted = _loaded_by(self, self.optimizer) if is_a_checkpoint else None
        if noted is not None:
            _loaded[self.callback_handler] = noted
        return result

    return load_and_note


_run, _load = getattr(Trainer, upstream.RUN), getattr(Trainer, upstream.LOAD_OPTIMIZER)  # first: may be missing
setattr(Trainer, upstream.RUN, _each_told(_run))
setattr(Trainer, upstream.LOAD_OPTIMIZER, _noted(_load))
Trainer.train = _begun_and_ended(Trainer.train)  # type: ignore[method-assign]


def _and_begin(tell: Callable[..., Any]) -> Callable[..., Any]:
    """
    `CallbackHandler.on_train_begin`, behind which training of ours begins: from what all callbacks, in any order, have
    made of the model.
    """

    @functools.wraps(tell)
    def tell_and_begin(self: CallbackHandler, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        loaded = _loaded.pop(self, None)
        if loaded is None and state.global_step:
            loaded = _loaded_by(self)  # a subclass has loaded the optimizer in its own way, or not at all
        control = tell(self, args, state, control, **kwargs)
        ours = callback_of(SimpleNamespace(callback_handler=self))  # a callback may have added it
        if ours is not None:
            if loaded is None and state.global_step:
                loaded = _loaded_by(self, self.optimizer)
            ours.begin(args, state, model=self.model, optimizer=self.optimizer, loaded=loaded)
        return control

    return tell_and_begin


CallbackHandler.on_train_begin = _and_begin(CallbackHandler.on_train_begin)  # type: ignore[method-assign]


def advise(args: TrainingArguments, state: TrainerState, parts: Parts, loader: Any) -> None:
    """
    What couples the ranks because the user asked for it is left alone, and said; of ratios the state has steps.

    Args:
        loader (`DataLoader`): The training's.
    """
    if args.world_size == 1:
        return
    config = parts.config
    if parts.trains_alone and isinstance(loader, DataLoaderDispatcher):
        parts.own_collectives.is_said = True
        logger.warning(
            "rank 0 reads the training data and broadcasts each batch: at every step each rank waits for the slowest. "
            "'costs' counts that as computation. Set accelerator_config={'dispatch_batches': False}."
        )
    if args.logging_strategy == "steps" and config.overlap_steps:
        logger.info(
            "logging_steps=%s: each log gathers the loss of all ranks, and waits for the slowest. Log less often; no "
            "figure of 'costs' has these waits",
            state.logging_steps,
        )
    elif args.logging_strategy == "steps" and state.logging_steps % config.sync_every:
        logger.info(
            "logging_steps=%s: each log gathers the loss of all ranks; a multiple of sync_every=%d would wait for "
            "nobody. No figure of 'costs' has these waits",
            state.logging_steps,
            config.sync_every,
        )
    if getattr(args, "include_num_input_tokens_seen", "no") not in ("no", False):
        parts.own_collectives.is_said = True
        logger.warning(
            "include_num_input_tokens_seen gathers at every micro-batch, and each rank waits for the slowest; 'costs' "
            "counts that as computation. Leave it out for a quiet wire."
        )
