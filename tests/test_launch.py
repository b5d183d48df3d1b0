"""
What docs/launch.md tells the reader to type: every command of it is one that the launchers' own parsers understand as
the page says, and `accelerate config` asks the questions of its table.
"""

from __future__ import annotations

import re
import shlex
import string
from importlib.metadata import version
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from packaging.version import Version
from torch.distributed.run import config_from_args, parse_args

from launcher import ROOT

PAGE = (ROOT / "docs" / "launch.md").read_text()
MACHINE = {"RANK": "0", "MAIN": "192.168.1.10", "PORT": "29500"}


def commands():
    """Of launchers, in blocks that are not excused: environment, launcher, and its words."""
    found = []
    for above, block in re.findall(r"([^\n]*)\n```bash\n(.*?)```", PAGE, re.DOTALL):
        if above.startswith("<!-- not run"):
            continue
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            words = shlex.split(string.Template(line).safe_substitute(MACHINE), comments=True)
            environment = [words.pop(0) for _ in list(words) if words and re.match(r"[A-Z_]+=", words[0])]
            if words and words[0] in ("accelerate", "torchrun"):
                found.append((environment, words[0], words[1:]))
    return found


def test_all_kinds_are_there():
    assert {launcher for _, launcher, _ in commands()} == {"accelerate", "torchrun"}
    assert len(commands()) == 8


@pytest.mark.parametrize(("environment", "launcher", "words"), commands())
def test_a_command_starts_what_the_page_says(monkeypatch, environment, launcher, words):
    monkeypatch.setattr("accelerate.commands.launch.default_config_file", "/nowhere")
    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda port: False)
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if launcher == "accelerate":
        args = _validate_launch_command(launch_command_parser().parse_args(words[1:]))[0]
        prepare_multi_gpu_env(args)
        machines, processes = args.num_machines, args.num_processes
        per_machine = int(args.nproc_per_node)
        if machines > 1:
            assert (args.rdzv_endpoint, int(args.node_rank) < machines) == ("192.168.1.10:29500", True)
    else:
        args = parse_args(words)
        config = config_from_args(args)[0]
        machines, per_machine = config.max_nodes, config.nproc_per_node
        processes = machines * per_machine
        assert config.min_nodes == machines
        if machines > 1:
            assert (args.master_addr, args.master_port) == ("192.168.1.10", 29500)
    assert processes == machines * per_machine >= 2
    assert machines in (1, 2, 8)
    if any(word.startswith("ACCELERATE_USE_CPU") for word in environment):
        assert processes == 2
    script = args.training_script
    assert script == "train.py" or (ROOT / script).is_file()


@pytest.mark.skipif(Version(version("accelerate")) < Version("1.10"), reason="it asks in other words with 1.3")
def test_accelerate_config_asks_what_the_page_answers(monkeypatch):
    """Its own dialogue, answered from the table: these questions, in this order, and the two machines come out."""
    from accelerate.commands.config import cluster, config
    from accelerate.utils import DistributedType

    table = PAGE.split("| question | answer |\n|---|---|\n")[1].split("\n\n")[0]
    rows = [tuple(row.strip("| ").split(" | ")) for row in table.splitlines()]
    assert rows[0] == ("In which compute environment are you running?", "This machine")
    assert rows[0][0] in Path(config.__file__).read_text()
    answers, asked = dict(rows), []

    def answer(prompt):
        question = re.sub(r"( Answer `no`.*)? *(\[[^\]]*\])?:? *$", "", prompt.split(" This can avoid")[0])
        asked.append(question)
        return re.split("[:;]|, or", answers[question])[0]

    def ask_field(prompt, convert_value=None, default=None, error_message=None):
        return (convert_value or str)(answer(prompt))

    def ask_options(prompt, options=(), convert_value=None, default=0):
        return (convert_value or str)(list(map(str, options)).index(answer(prompt)))

    monkeypatch.setattr(cluster, "_ask_field", ask_field)
    monkeypatch.setattr(cluster, "_ask_options", ask_options)
    found = cluster.get_cluster_input()
    assert asked == [question for question, _ in rows[1:]]
    assert found.distributed_type == DistributedType.MULTI_GPU
    assert (found.num_machines, found.num_processes, found.machine_rank, found.mixed_precision) == (2, 16, 0, "bf16")
    assert (found.main_process_ip, found.main_process_port) == ("192.168.1.10", 29500)
