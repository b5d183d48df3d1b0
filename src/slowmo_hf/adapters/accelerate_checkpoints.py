"""`accelerator.save_state` and `load_state` with every worker's own state."""

from __future__ import annotations

import functools
import re
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate.accelerator import Accelerator
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard, SkipBatchSampler, SkipDataLoader
from torch.utils.data import DataLoader

from .. import upstream
from ..checkpoints.files import FOLDER, MANIFEST, read_part, write_part
from ..checkpoints.manifest import Digests, Stamps, stamps, unseal, verify_in_turns
from ..checkpoints.places import SHARED
from ..checkpoints.state import check_snapshot, seal_snapshot, write_snapshot
from ..checkpoints.together import (
    begin_together,
    deleting_older_than,
    finish_together,
    keeps_files,
    read_together,
    together,
    turn_at_reading,
)
from ..contents import CheckpointError, Contents
from ..log import logger
from ..random_state import RandomState
from ..training.outer_loop import OuterLoop
from ..training.written import LoadedSettings
from ..wire.job import is_in_process, rank_in_job
from .accelerate_objects import held_beside, own_objects
from .exit_notice import saves
from .functions import consensus, prepared_by, unwrap
from .optimizer import SlowMoOptimizer

_NUMBERED = re.compile(r"checkpoint_(\d+)")  # as `automatic_checkpoint_naming` names them
_registered: weakref.WeakKeyDictionary[Accelerator, list[weakref.ref[SlowMoOptimizer]]] = weakref.WeakKeyDictionary()


def register_for_checkpointing(accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> None:
    """
    Have `accelerator.save_state` and `load_state` save and load an optimizer that `accelerator.prepare` has not taken;
    those that it took need no line. The folder gets the average where Accelerate puts the model, and beside it every
    worker's own weights, inner optimizer and messages, which a load takes up before training goes on. A model that was
    not prepared either needs `accelerator.register_for_checkpointing(model)`, as in stock Accelerate.

    Save into a new folder each time (`ProjectConfiguration(automatic_checkpoint_naming=True)`): a save over an old
    folder that is killed half-way would mix the two.

    Args:
        accelerator (`accelerate.Accelerator`): The one that saves.
        optimizer (`torch.optim.Optimizer`): A `SlowMoOptimizer`, bare or prepared.

    Raises:
        TypeError: It is none.
    """
    bare = unwrap(optimizer)
    if bare not in _ours(accelerator).values():
        _registered.setdefault(accelerator, []).append(weakref.ref(bare))


def _ours(accelerator: Accelerator) -> dict[str, SlowMoOptimizer]:
    """Those that it saves, by the folder of theirs in a checkpoint, with a slash; the first one has none."""
    found = prepared_by(accelerator)
    first_free = len(upstream.held_by(accelerator)[0])
    for place, registered in enumerate(_registered.get(accelerator, ()), start=first_free):
        if one := registered():
            found[place] = one
    first = min(found, default=0)
    return {("" if place == first else f"optimizer_{place}/"): one for place, one in found.items()}


def _in_training(accelerator: Accelerator) -> dict[str, SlowMoOptimizer]:
    """Without those of stages that have ended, whose parameters are others now."""

    def has_ended(loop: OuterLoop | None) -> bool:
        return loop is not None and loop.in_flight.is_over and bool(loop.tensors.problem())

    return {folder: bare for folder, bare in _ours(accelerator).items() if not has_ended(bare.outer_loop)}


def _is_kept(accelerator: Accelerator, bare: SlowMoOptimizer) -> bool:
    """Plain all-reduce that Accelerate has taken is stock training, and so are its checkpoints."""
    return bare.config.has_rounds or bare not in prepared_by(accelerator).values()


# ---- saving ----


def _complete(save_state: Callable[..., Any]) -> Callable[..., Any]:
    """
    `Accelerator.save_state` with the average shown, so that whatever is written of a model is the average's: by
    Accelerate, or by a hook of the user's own. The manifest comes last: a save that was killed before has none.
    """

    @functools.wraps(save_state)
    def save(self: Accelerator, *args: Any, **kwargs: Any) -> Any:
        ours = _in_training(self)
        _, _, registered, prepared = upstream.held_by(self)
        models = [one for one in (*prepared, *registered) if isinstance(one, torch.nn.Module)]
        for bare in ours.values():
            if bare.outer_loop is None and bare.awaits_a_checkpoint:
                bare.begun(models)  # it trains from a later step on
        begun = {
            folder: bare.outer_loop
            for folder, bare in ours.items()
            if bare.outer_loop is not None and _is_kept(self, bare)
        }
        if not begun:
            return save_state(self, *args, **kwargs)
        seal_last: list[Callable[[], None]] = []
        chosen = kwargs.get("output_dir", args[0] if args else None)
        # Otherwise Accelerate names a folder of its own.
        before = stamps(Path(chosen).expanduser()) if chosen else {}
        for outer_loop in begun.values():
            outer_loop.consensus.meet()
        project = self.project_configuration
        limit = project.total_limit if project.automatic_checkpoint_naming else None
        with ExitStack() as given_back:
            for name in ("save_on_each_node", "total_limit"):
                given_back.callback(setattr, project, name, getattr(project, name))
            project.total_limit = None  # type: ignore[assignment]  # it deletes before the new one is begun
            for bare in ours.values():
                given_back.enter_context(consensus(bare))
            for folder, bare in _ours(self).items():
                if folder in begun or folder not in ours:
                    given_back.enter_context(_beside(bare))
            hook = self.register_save_state_pre_hook(
                lambda models, weights, folder: seal_last.append(_write(self, begun, Path(folder), before, limit))
            )
            given_back.callback(hook.remove)
            saved_to = save_state(self, *args, **kwargs)
        for seal_it in seal_last:
            seal_it()
        if seal_last and saved_to is not None:
            saves.add(saved_to)
        return saved_to

    return save


@contextmanager
def _beside(bare: SlowMoOptimizer) -> Iterator[None]:
    """Inside, its slow state lies beside what Accelerate has of it: every process's own."""
    bare.state_is_beside = True
    try:
        yield
    finally:
        bare.state_is_beside = False


def _write(
    accelerator: Accelerator, begun: dict[str, OuterLoop], folder: Path, before: Stamps, limit: int | None
) -> Callable[[], None]:
    """
    Our part, before Accelerate's own; the result seals the folder once that is written too, and deletes those over
    `total_limit`. Collective.
    """
    first = next(iter(begun.values()))
    keeping = keeps_files(first, folder, whole_on_each=_is_whole_on_each(accelerator, begun))
    if not keeping.all_see and not accelerator.project_configuration.save_on_each_node:
        logger.info("%s is not shared by all machines: save_on_each_node is set, and each keeps its own part", folder)
        accelerator.project_configuration.save_on_each_node = True
    words = f"checkpoint {folder} cannot be written"
    objects = own_objects(accelerator, first)  # before `write_snapshot` begins, where workers may meet
    begin_together(first, words, folder, keeping, lambda: None)
    if is_in_process():
        generators = Contents(objects=RandomState.take().to_dict())
        together(first, words, lambda: write_part(folder, _generators(), generators))
    for within, outer_loop in begun.items():
        write = functools.partial(
            write_snapshot,
            str(folder),
            outer_loop,
            shared=keeping.shared_of(outer_loop),
            objects=objects,
            within=within,
        )
        together(outer_loop, words, write)

    def finish(digests: Digests) -> None:
        if keeping.seals:
            seal_snapshot(folder, first, digests, before)

    def seal_and_rotate() -> None:
        finish_together(first, folder, keeping, finish, before)
        if limit is not None:
            words = f"checkpoints older than {folder} cannot be deleted"
            together(first, words, lambda: _rotate(folder, limit) if keeping.seals else None)

    return seal_and_rotate


def _rotate(newest: Path, limit: int) -> None:
    """Delete the oldest beside it, on each file system, so that `total_limit` are left."""
    found = _numbered(newest.parent)
    older = [path for path in found if path != newest]
    with deleting_older_than(newest):
        for path in older[: max(0, len(found) - limit)]:
            logger.info("deleting %s: total_limit=%d", path, limit)
            unseal(path)
            shutil.rmtree(path)


def _numbered(folder: Path) -> list[Path]:
    """Accelerate's checkpoints in a folder, the oldest first."""
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NUMBERED.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _is_whole_on_each(accelerator: Accelerator, begun: dict[str, OuterLoop]) -> bool:
    """Accelerate's own part of a checkpoint, on each machine. FSDP's sharded state dictionaries are in parts."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    is_sharded = any(outer_loop.workers.holds_shards for outer_loop in begun.values())
    return not is_sharded or plugin is None or plugin.state_dict_type.name == "FULL_STATE_DICT"


def _generators() -> str:
    """
    The files of a worker of `run_in_process` with its random generators: the one that Accelerate writes for a process
    is written by all its workers, one over the other.
    """
    return f"generators_{rank_in_job()}"


# ---- loading ----


def _with_ours(load_state: Callable[..., Any]) -> Callable[..., Any]:
    """
    `Accelerator.load_state` whose optimizers go on from every worker's own state, at their next pass. Accelerate loads
    rank 0's model, optimizer and scaler on every rank: ours must come later.
    """

    @functools.wraps(load_state)
    def load(self: Accelerator, *args: Any, **kwargs: Any) -> Any:
        found: list[Path] = []
        settings: list[LoadedSettings] = []  # one, as soon as Accelerate has loaded

        def wait(models: list[Any], folder: str) -> None:
            found.append(Path(folder))
            verify = functools.cache(verify_in_turns)  # reads every byte: once for all optimizers
            for within, bare in _in_training(self).items():
                if _is_kept(self, bare):
                    bare.before_training(functools.partial(_take_up, Path(folder), within, verify, settings))

        if _ours(self) and not args and kwargs.get("input_dir") is None:
            kwargs["input_dir"] = _whole_one(self)
        with ExitStack() as given_back:
            for bare in _ours(self).values():  # of FSDP Accelerate loads model and optimizer before it calls a hook
                given_back.enter_context(_beside(bare))
                if bare.outer_loop is not None:
                    bare.outer_loop.consensus.restore()
            given_back.callback(self.register_load_state_pre_hook(wait).remove)
            result = load_state(self, *args, **kwargs)
        for folder in found if is_in_process() else ():
            _give_back_generators(folder)
        waiting = [bare.inner_optimizer for bare in _ours(self).values() if bare.awaits_a_checkpoint]
        if waiting:
            settings.append(LoadedSettings(waiting, held_beside(self)))
            _wrap_iterators()
            _loaded_generators[:] = [RandomState.take()]
        return result

    return load


def _whole_one(accelerator: Accelerator) -> str | None:
    """Of numbered checkpoints the newest that was finished; None where Accelerate finds that itself."""
    folder = Path(str(accelerator.project_dir)) / "checkpoints"
    if not (accelerator.project_configuration.automatic_checkpoint_naming and folder.is_dir()):
        return None
    found = _numbered(folder)
    whole = next((path for path in reversed(found) if not _was_cut_off(path)), None)
    if whole is None or whole == found[-1]:
        return None
    logger.warning("%s was never finished: %s is loaded in its place", found[-1], whole.name)
    return str(whole)


def _was_cut_off(path: Path) -> bool:
    """Nothing is in it, or our part without its end; a stock one has none of ours."""
    return not any(path.iterdir()) or ((path / FOLDER).is_dir() and not (path / FOLDER / MANIFEST).is_file())


def _give_back_generators(folder: Path) -> None:
    """This worker's own; an older checkpoint has none, nor has one of fewer workers."""
    path = folder / FOLDER / f"{_generators()}.pt"
    if not path.exists():
        return
    saved = read_part(folder, _generators()).objects
    try:
        RandomState.from_dict(saved).give_back()
    except Exception as error:  # of Python, numpy or torch
        raise CheckpointError(
            f"{path} holds no state of random generators ({type(error).__name__}: {error}). Resume from another "
            "checkpoint."
        ) from error


_loaded_generators: list[RandomState] = []  # from a load to the first pass: one
_skipped_over: weakref.WeakSet[Any] = weakref.WeakSet()  # streams' loaders, whose first batches are skipped


@functools.cache
def _wrap_iterators() -> None:
    """
    A run that goes on inside a pass over its data makes a new iterator (`skip_first_batches`), which draws from the
    generators that Accelerate has loaded. The run that was saved drew nothing there: they go back behind the draw.
    """
    iterate = DataLoader.__iter__

    @functools.wraps(iterate)
    def iterate_and_give_back(self: DataLoader[Any]) -> Any:
        iterator = iterate(self)
        # A loader without a batch size has its batches' sampler as its sampler.
        skips = self in _skipped_over or any(
            isinstance(one, SkipBatchSampler) and one.skip_batches for one in (self.batch_sampler, self.sampler)
        )
        if _loaded_generators and skips:
            _loaded_generators.pop().give_back()
        return iterator

    DataLoader.__iter__ = iterate_and_give_back  # type: ignore[method-assign]
    for kind in (DataLoaderShard, DataLoaderDispatcher, SkipDataLoader):
        kind.__iter__ = _noting_streams(kind.__iter__)  # type: ignore[method-assign]


def _noting_streams(iterate: Callable[..., Any]) -> Callable[..., Any]:
    """Of a stream Accelerate's loader skips batches that the one inside it has made."""

    @functools.wraps(iterate)
    def note(self: Any) -> Any:
        if self.skip_batches:
            _skipped_over.add(self.base_dataloader)
        return iterate(self)

    return note


def _nothing(objects: dict[str, Any]) -> None:
    """Where Accelerate's own load has failed."""


def _take_up(
    folder: Path,
    within: str,
    verify: Callable[..., None],
    settings: list[LoadedSettings],
    outer_loop: OuterLoop,
) -> None:
    _loaded_generators.clear()
    words = f"checkpoint {folder} cannot be resumed"

    if any(outer_loop.workers.world.gather_objects((folder / FOLDER).is_dir())):
        # Nobody reads what another has found damaged.
        turn = turn_at_reading(outer_loop, folder)
        together(outer_loop, words, lambda: verify(folder, *turn))
    if not any(outer_loop.workers.world.gather_objects(any((folder / FOLDER).glob(f"{within}{SHARED}*.json")))):
        if outer_loop.attempted_steps:
            raise CheckpointError(
                f"{folder} has no state of local training, and this run has begun: load it before the first step."
            )
        logger.warning(
            "%s has no state of local training: weights and optimizer are taken, slow momentum starts fresh", folder
        )
        return
    with suppress(ValueError):
        # Here, where no rank has failed yet; what was wrong there belongs to the run that is left.
        outer_loop.in_flight.start_what_others_wait_for()

    give_back = settings[0].changes(outer_loop.inner_state.optimizer, outer_loop.tensors) if settings else _nothing
    objects = read_together(outer_loop, words, lambda: check_snapshot(str(folder), outer_loop, within=within))
    saves.add(folder)
    give_back(objects)


Accelerator.save_state = _complete(Accelerator.save_state)  # type: ignore[method-assign]
Accelerator.load_state = _with_ours(Accelerator.load_state)  # type: ignore[method-assign]
