"""
Several machines, made of network namespaces: `accelerate launch --num_machines 4` trains what four processes on one
machine train.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harness import patience
from hosts import Hosts, why_not
from launcher import run_script

ROOT = Path(__file__).parents[1]

needs_hosts = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
FLAGS = ["--max_train_samples", "800", "--max_eval_samples", "40", "--eval_strategy", "no", "--logging_steps", "12"]
FLAGS += ["--per_device_train_batch_size", "8"]
RECIPE = str(ROOT / "recipes" / "image" / "train.py")


def namespaces():
    """Of this process: another test session on the machine has its own."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.split()
    return [name for name in listed if name.startswith(f"slowmo-{os.getpid()}-")]


@needs_hosts
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_four_machines_train_what_one_does_and_send_what_theory_says(tmp_path):
    """
    The end is bit for bit that of four processes on one machine. Between a run of 12 and one of 36 steps lie two
    rounds: on the interface each host sends their payload and at most 7 % more (headers of packets of 1,500 bytes,
    acknowledgements).
    """
    records, sent = {}, {}
    with Hosts(4, mbit_per_s=200) as hosts:
        for steps in (12, 36):
            before = [hosts.bytes_sent(host) for host in range(4)]
            hosts.launch(
                RECIPE,
                *FLAGS,
                "--max_steps",
                str(steps),
                "--output_dir",
                str(tmp_path / str(steps)),
                timeout_seconds=patience(120),
            )
            sent[steps] = [hosts.bytes_sent(host) - earlier for host, earlier in enumerate(before)]
            records[steps] = json.loads((tmp_path / str(steps) / "record.json").read_text())
    assert not namespaces()
    flags = [RECIPE, *FLAGS, "--max_steps", "36", "--output_dir", str(tmp_path / "alone")]
    run_script(flags, 4, tmp_path / "alone")
    on_hosts, on_one = (load_file(tmp_path / folder / "model.safetensors") for folder in ("36", "alone"))
    assert on_hosts.keys() == on_one.keys()
    assert all(torch.equal(on_hosts[name], on_one[name]) for name in on_one)
    payload = records[36]["bytes_sent_per_worker"] - records[12]["bytes_sent_per_worker"]
    assert records[36]["rounds"] - records[12]["rounds"] == 2
    for host in range(4):
        assert payload <= sent[36][host] - sent[12][host] <= 1.07 * payload + 50_000, (
            "50 kB: roll call, logs, the shutdown"
        )


@needs_hosts
def test_hosts_go_after_an_error():
    hosts = Hosts(2)
    with contextlib.suppress(ZeroDivisionError), hosts:
        assert len(namespaces()) == 3
        sleeper = hosts.start(1, "sleep", "60")
        raise ZeroDivisionError
    assert not namespaces()
    assert sleeper.returncode


@needs_hosts
def test_a_host_that_prints_much_is_not_stopped_by_it():
    with Hosts(1) as hosts:
        counting = hosts.start(0, "seq", "200000")
        assert counting.wait(timeout=patience(20)) == 0
        assert hosts.printed(counting).splitlines() == [str(number) for number in range(1, 200_001)]


@needs_hosts
def test_mates_reach_each_other_by_a_link_of_their_own():
    """Four hosts on two machines: 10.77.0.1 and .2 are mates, .3 is on the other one."""
    with Hosts(4, mbit_per_s=1, mates=2) as hosts:
        for there, link in ((1, "mate1"), (2, "eth0"), (3, "eth0")):
            asked = hosts.start(0, "ip", "route", "get", hosts.address(there))
            assert asked.wait(timeout=patience(20)) == 0
            assert f"{hosts.address(there)} dev {link} src {hosts.address(0)} " in hosts.printed(asked)


def test_without_root_it_says_what_to_do(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RuntimeError, match="ip and tc not found: install iproute2"), Hosts(2):
        pass
    monkeypatch.undo()
    if why_not() is None:
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        with pytest.raises(RuntimeError, match="need root: run this as root"), Hosts(2):
            pass
