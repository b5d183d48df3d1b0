"""Warnings are errors in tests, here and in worker processes; CUDA tests are skipped where there is no CUDA device;
time limits scale by TEST_PATIENCE; tests that share a fixture of their file run in one process."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch

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
        if any(found[-1].scope == "module" for found in item._fixtureinfo.name2fixturedefs.values()):
            item.add_marker(pytest.mark.xdist_group(item.path.name))  # what they share is made once
