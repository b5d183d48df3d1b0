"""A run under Trainer that is saved, copied, spoilt and resumed."""

import logging
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback

from harness import patience
from slowmo_hf import SlowMoCallback, SlowMoConfig
from slowmo_hf.checkpoints.manifest import verify_checkpoint
from slowmo_hf.contents import CheckpointError
from tiny import Recorder, Regression, Rows, arguments, equal, recorded

STEPS, EPOCH, MIDDLE = 9, 6, 5  # rounds end at 4 and 8, an epoch at 6
CONFIG = SlowMoConfig(sync_every=4, outer_momentum=0.5, timeout_seconds=patience(30))
PLAIN = SlowMoConfig.local_sgd(4, timeout_seconds=patience(30))
GOSSIP = {
    "sgp": SlowMoConfig(base="sgp", sync_every=4, timeout_seconds=patience(30)),
    "osgp": SlowMoConfig(base="osgp", sync_every=4, timeout_seconds=patience(30)),
    "own anchors": SlowMoConfig(base="sgp", sync_every=4, exact_average=False, timeout_seconds=patience(30)),
}


class Stop(TrainerCallback):
    """Ends training after a step's save."""

    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@contextmanager
def heard():
    """What the package says meanwhile."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("slowmo_hf")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def of_rank_0(lines):
    """Lines come once per job."""
    box = [lines]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def make(
    folder,
    config=CONFIG,
    model=None,
    data=None,
    watchers=(),
    kind=Trainer,
    ours=SlowMoCallback,
    added=False,
    **settings,
):
    """
    (recorder, trainer), with a checkpoint after every step unless `settings` say otherwise; config None is stock
    training. With `added` the callbacks are added to a Trainer that is there.
    """
    recorder = Recorder()
    last = [watcher for watcher in watchers if isinstance(watcher, Stop)]  # when the save is finished
    callbacks = [
        recorder,
        *(w for w in watchers if w not in last),
        *([ours(config)] if config else []),
        *last,
    ]
    defaults = {"max_steps": STEPS, "learning_rate": 0.02, "save_strategy": "steps", "save_steps": 1, "seed": 5}
    rows = data or Rows(24, torch.float32)
    trainer = kind(
        model=model or Regression(torch.float32),
        args=arguments(folder, **{**defaults, "per_device_train_batch_size": 2, **settings}),
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=None if added else callbacks,
    )
    for callback in callbacks if added else ():
        trainer.add_callback(callback)
    return recorder, trainer


def train(folder, *arguments_of_make, resume=None, stop=None, watchers=(), **settings):
    """
    Train; returns the recording, with the inner optimizer's state, what was said, and the trainer's arguments as they
    are left.
    """
    with heard() as said:
        recorder, trainer = make(
            folder, *arguments_of_make, watchers=[*watchers, *([Stop(stop)] if stop else [])], **settings
        )
        try:
            trainer.train(resume_from_checkpoint=resume)
        except KeyboardInterrupt:
            assert stop
    inner = trainer.optimizer.optimizer.state_dict()["state"]
    kept = {name: getattr(trainer.args, name) for name in ("save_total_limit", "save_on_each_node", "hub_strategy")}
    best = trainer.state.best_global_step
    return {**recorded(trainer, recorder), "inner": inner, "said": of_rank_0(said), "args": kept, "best": best}


def same_end(first, resumed, steps=None):
    """
    Weights and buffers after every step that both have taken, the final ones, and the inner optimizer's state: bit for
    bit.
    """
    count = len(resumed["after"])
    assert 0 < count == (steps or count)
    for mine, other in zip(first["after"][-count:], resumed["after"], strict=True):
        assert equal(mine, other)
    assert equal(first["final"], resumed["final"])
    assert first["inner"].keys() == resumed["inner"].keys()
    for index, state in first["inner"].items():
        assert equal(state, resumed["inner"][index])


def rank0(act):
    """Do it on rank 0 while the other waits."""
    dist.barrier()
    if dist.get_rank() == 0:
        act()
    dist.barrier()


def copy(checkpoint, output, change=lambda folder: None):
    """A copy of a checkpoint in another output folder, changed; returns it."""
    target = Path(output) / checkpoint.name

    def act():
        shutil.copytree(checkpoint, target)
        change(target)

    rank0(act)
    return target


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()
    }


def checkpoints(folder):
    return {path.name for path in Path(folder).glob("*checkpoint-*")}


def whole(folder):
    """Names of the checkpoints that `verify_checkpoint` lets pass."""
    found = set()
    for path in Path(folder).glob("checkpoint-*"):
        try:
            verify_checkpoint(path)
        except CheckpointError:
            continue
        found.add(path.name)
    return found


def save_all(folder):
    """
    The runs that tests copy from. Their folder is moved afterwards: what a checkpoint recorded of its place
    is stale.
    """
    first = train(folder / "there" / "run")
    for name, config in {"plain": PLAIN, **GOSSIP}.items():
        train(folder / "there" / name, config, stop=MIDDLE, save_steps=MIDDLE)
    rank0(lambda: (folder / "there").rename(folder / "here"))
    return first
