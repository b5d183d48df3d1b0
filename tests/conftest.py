"""Warnings are errors in tests, here and in worker processes; CUDA tests are skipped where there is no CUDA device;
time limits scale by TEST_PATIENCE; tests of a file that share a fixture run in one process; files lie in memory."""

import functools
import multiprocessing.util
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch
from accelerate.state import AcceleratorState
from xdist.scheduler import LoadScopeScheduling

from harness import patience, run_workers, warnings_are_errors

torch.set_num_threads(1)

MEMORY = Path("/dev/shm")
ROOM = 4 * 2**30  # bytes; all tests together need less


def _folder_in_memory():
    """For all that tests write, unless TMPDIR says where: a checkpoint is written through to the disk, and waits."""
    if "TMPDIR" in os.environ or not MEMORY.is_dir():
        return None
    there = os.statvfs(MEMORY)
    if there.f_flag & os.ST_NOEXEC or there.f_bavail * there.f_frsize < ROOM:
        return None
    return tempfile.mkdtemp(prefix="slowmo-tests-", dir=MEMORY)


FOLDER = _folder_in_memory()
if FOLDER:  # processes that tests start have it from the environment, pytest's own among them
    os.environ["TMPDIR"] = tempfile.tempdir = FOLDER
    # Behind multiprocessing's own, of priority -100, which removes a folder inside.
    multiprocessing.util.Finalize(None, shutil.rmtree, (FOLDER, True), exitpriority=-200)


@pytest.fixture(autouse=True)
def _warnings():
    import warnings

    with warnings.catch_warnings():
        warnings_are_errors()
        yield


@pytest.fixture(autouse=True)
def _no_accelerator():
    """As in a new program: where an Accelerator was made, a pass before `accelerator.prepare` is none of training."""
    AcceleratorState._reset_state()


@pytest.fixture(scope="session")
def corpus():
    """A part of the translation recipe's shipped text."""
    from translation.data import load_corpus

    return load_corpus(max_train_samples=2000, max_eval_samples=60)


@pytest.fixture(scope="session")
def tokenizer(corpus):
    """Of that text."""
    from translation import tokens

    return tokens.train_tokenizer(tokens.sentences_of(corpus.train), 1000)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Folder of the runs of `saved_runs.save_all`, and what each rank recorded of the main one."""
    from saved_runs import save_all

    folder = tmp_path_factory.mktemp("saved")
    return folder / "here", run_workers(save_all, 2, folder)


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        own = item.get_closest_marker("timeout")
        seconds = own.args[0] if own else float(config.getini("timeout"))
        item.add_marker(pytest.mark.timeout(patience(seconds)))
    if hasattr(config, "workerinput"):  # the long ones first: no process is left with one at the end
        items.sort(key=lambda item: "slow" not in item.keywords)


@pytest.fixture(scope="module")
def _under_way(request):
    """The ranks of all tests marked `apart`: they mostly wait for each other, so they do it side by side."""
    marks = {
        item.nodeid: item.get_closest_marker("apart") for item in request.session.items if item.path == request.path
    }
    from apart import SIDE_BY_SIDE, run_apart

    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        yield {name: pool.submit(run_apart, *mark.args, **mark.kwargs) for name, mark in marks.items() if mark}
        pool.shutdown(cancel_futures=True)  # where a test stops the session


@pytest.fixture
def apart(request, _under_way):
    """What `run_apart` gives for this test's mark."""
    return _under_way[request.node.nodeid].result()


class FilesThatShare(LoadScopeScheduling):
    """Tests go to the process that is free, one by one; those of a file with fixtures of its own stay together."""

    def _split_scope(self, nodeid):
        file = nodeid.partition("::")[0]
        return file if has_shared_fixtures(file) else nodeid


@functools.cache
def has_shared_fixtures(file):
    text = Path(__file__).parents[1].joinpath(file).read_text()
    return 'scope="module"' in text or "mark.apart" in text


def pytest_xdist_make_scheduler(config, log):
    return FilesThatShare(config, log)
