"""What tests stand on: workers with a frozen heap, time limits that scale, scripts that start and start again."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

import harness
from harness import patience, run_workers
from launcher import launch, run_script


def frozen_objects():
    """Nothing is imported here: it would hide that the server has not."""
    server = sys.modules.get("frozen_heap")
    return gc.get_freeze_count(), server and server.OBJECTS, set(harness.PRELOADED) - set(sys.modules)


def test_workers_start_with_a_frozen_heap():
    """A module that fails to preload is left out silently: the count of what was frozen tells."""
    for frozen, counted, missing in run_workers(frozen_objects, 2):
        assert missing == set()
        assert counted >= frozen > 0.99 * counted > 200_000, "some of what was frozen has been freed since"


def test_time_limits_scale(monkeypatch):
    monkeypatch.setattr(harness, "PATIENCE", 2.5)
    assert patience(4) == 10


# With torch before 2.8 a process hangs that destroys a group while gloo's thread still holds its last message.
SCRIPT = """
import os, sys, time
import torch.distributed as dist
dist.init_process_group("gloo")
told = [None] * dist.get_world_size()
dist.all_gather_object(told, int(os.environ["RANK"]))
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
print(f"attempt {attempt}: {told} {sys.argv[1:]}", flush=True)
if attempt < int(sys.argv[1]) and dist.get_rank() == 1:
    sys.exit("not yet")
time.sleep(0.1)
dist.destroy_process_group()
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return str(path)


def test_a_script_starts_with_its_flags_and_its_ranks(script, tmp_path):
    said = run_script([script, "0", "--flag"], 2, tmp_path)
    assert said.splitlines().count("attempt 0: [0, 1] ['0', '--flag']") == 2
    assert not dist.is_initialized()


@pytest.mark.parametrize(("failures", "restarts", "code"), [(1, 1, 0), (2, 1, 1)])
def test_a_script_is_started_again_when_a_process_fails(script, tmp_path, failures, restarts, code):
    said = tmp_path / "said"
    assert launch([script, str(failures)], 2, dict(os.environ), said, restarts) == code
    words = said.read_text()
    assert words.count("not yet") == failures
    assert [f"attempt {attempt}:" in words for attempt in range(3)] == [True, True, False]
    assert Path(script).exists()
