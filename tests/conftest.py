"""Warnings are errors in tests, here and in worker processes; CUDA tests are skipped where there is no CUDA device;
time limits scale by TEST_PATIENCE; tests of a file that share a fixture run in one process."""

import functools
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

from harness import patience, warnings_are_errors

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _warnings():
    import warnings

    with warnings.catch_warnings():
        warnings_are_errors()
        yield


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        own = item.get_closest_marker("timeout")
        seconds = own.args[0] if own else float(config.getini("timeout"))
        item.add_marker(pytest.mark.timeout(patience(seconds)))


class FilesThatShare(LoadScopeScheduling):
    """Tests go to the process that is free, one by one; those of a file with fixtures of its own stay together."""

    def _split_scope(self, nodeid):
        file = nodeid.partition("::")[0]
        return file if has_shared_fixtures(file) else nodeid


@functools.cache
def has_shared_fixtures(file):
    return 'scope="module"' in Path(__file__).parents[1].joinpath(file).read_text()


def pytest_xdist_make_scheduler(config, log):
    return FilesThatShare(config, log)
