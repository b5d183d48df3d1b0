"""What users hand to the constructors: it means what they expect, or the error says what to write."""

from __future__ import annotations

import dataclasses
import functools
import json
import pickle
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments

import slowmo_hf
from harness import run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig, SlowMoOptimizer, hints, names
from slowmo_hf.checkpoints.state import _FIXED

LINEAR = torch.nn.Linear(2, 1)


class OwnOuter(torch.optim.SGD):
    """At the top of a module: found by its path."""


def sgd():
    return torch.optim.SGD(LINEAR.parameters(), lr=0.1)


def words_of(error, make):
    with pytest.raises(error) as found:
        make()
    return str(found.value)


# ---- settings for the callback and the optimizer ----

HOLDERS = {
    "SlowMoCallback({})": lambda *given, **settings: SlowMoCallback(*given, **settings).config,
    "SlowMoOptimizer(optimizer, {})": lambda *given, **settings: SlowMoOptimizer(sgd(), *given, **settings).config,
}


@pytest.fixture(params=HOLDERS)
def holder(request):
    return request.param


def test_both_take_the_same_settings(holder):
    """A SlowMoConfig, a dictionary, names, or nothing."""
    make, expected = HOLDERS[holder], SlowMoConfig(sync_every=24)
    assert make() == make(None) == make({}) == SlowMoConfig()
    assert make(expected) is expected
    assert make({"sync_every": 24}) == make(expected.to_dict()) == make(sync_every=24) == expected


@pytest.mark.parametrize(
    ("given", "ways"),
    [
        (24, ["SlowMoConfig(sync_every=24)"]),
        ("sgp", ["SlowMoConfig(base='sgp')"]),
        ("local_sgd", ["SlowMoConfig(base='local_sgd')", "SlowMoConfig.local_sgd()"]),
        ("LocalSGD", ["SlowMoConfig(base='local_sgd')", "SlowMoConfig.local_sgd()"]),
        ("diloco", ["SlowMoConfig.diloco()"]),
        ("bmuf", ["SlowMoConfig.bmuf(block_momentum=0.9)"]),
        ("wrong", ["SlowMoConfig()"]),
        (SlowMoConfig, ["SlowMoConfig()"]),
        (SlowMoConfig.diloco, ["SlowMoConfig.diloco()"]),
        (True, ["SlowMoConfig(sync_every=24)"]),
        ([24], ["SlowMoConfig(sync_every=24)"]),
    ],
)
def test_anything_else_is_told_what_to_write(holder, given, ways):
    """And what is told works."""
    words = words_of(ValueError, lambda: HOLDERS[holder](given))
    assert words.startswith("config must be a SlowMoConfig, or a dictionary of its fields, got ")
    assert words.endswith(f"Write {' or '.join(holder.format(way) for way in ways)}.")
    for way in ways:
        assert isinstance(eval(way), SlowMoConfig)


@pytest.mark.parametrize(
    ("given", "place"),
    [
        (lambda: TrainingArguments("unused", use_cpu=True), "a TrainingArguments, which is for Trainer(args=...)"),
        (lambda: LINEAR, "a Linear, which is for the Trainer"),
        (sgd, "a SGD, which is for SlowMoOptimizer"),
        (SlowMoCallback, "a SlowMoCallback, which is made already"),
    ],
)
def test_what_belongs_elsewhere_is_named_with_its_place(holder, given, place):
    assert f"got {place}" in words_of(ValueError, lambda: HOLDERS[holder](given()))


def test_settings_twice_or_misspelt(holder):
    make = HOLDERS[holder]
    words = words_of(ValueError, lambda: make(SlowMoConfig(), sync_every=24))
    assert words == "config must hold all settings, got others beside it: sync_every=24. Put them into config."
    assert "Did you mean sync_every in place of sync_evry?" in words_of(TypeError, lambda: make(sync_evry=24))
    assert "Did you mean sync_every in place of sync_evry?" in words_of(ValueError, lambda: make({"sync_evry": 24}))


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (lambda: LINEAR, "a Linear"),
        (SlowMoConfig, "a SlowMoConfig, which is the second argument"),
        (lambda: torch.optim.SGD, "<class 'torch.optim.sgd.SGD'>"),
        (LINEAR.parameters, "<generator object"),
        (lambda: [sgd()], "[SGD ("),
    ],
)
def test_something_else_than_an_optimizer(given, what):
    words = words_of(TypeError, lambda: SlowMoOptimizer(given()))
    assert f"inner_optimizer must be a torch.optim.Optimizer, got {what}" in words
    assert "Write SlowMoOptimizer(torch.optim.AdamW(model.parameters(), lr=...), SlowMoConfig())." in words


# ---- outer optimizers ----


def test_a_class_is_its_path():
    """Equal to the path as users write it, of JSON values, and found again by the path."""
    for made, path in ((torch.optim.SGD, "torch.optim.SGD"), (OwnOuter, f"{__name__}.OwnOuter")):
        config = SlowMoConfig(outer_optimizer=made, outer_optimizer_kwargs={"momentum": 0.9})
        assert config == SlowMoConfig(outer_optimizer=path, outer_optimizer_kwargs='{"momentum": 0.9}')
        assert SlowMoConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        assert config.outer_optimizer_class() is made
        assert SlowMoCallback({"outer_optimizer": made}).config.outer_optimizer == path


def test_a_class_in_use():
    """Nesterov SGD at rate 0.5 from 8: Delta = 2, v = 2, step 0.5 (2 + 0.9 * 2) = 1.9."""
    weight = torch.nn.Parameter(torch.tensor([8.0]))
    settings = {"outer_optimizer_kwargs": {"momentum": 0.9, "nesterov": True}, "outer_lr": 0.5, "sync_every": 2}
    optimizer = SlowMoOptimizer(torch.optim.SGD([weight], lr=1.0), outer_optimizer=torch.optim.SGD, **settings)
    for _ in range(2):
        weight.grad = torch.tensor([1.0])
        optimizer.step()
    assert weight.item() == pytest.approx(8 - 1.9)


def test_a_class_without_a_path_and_an_instance_are_refused():
    class Inner(torch.optim.SGD):
        pass

    words = words_of(ValueError, lambda: SlowMoConfig(outer_optimizer=Inner))
    assert "outer_optimizer must be a class that its dotted path leads to" in words
    assert words.endswith("Define it at the top of a module.")
    for given in (sgd(), functools.partial(torch.optim.SGD, momentum=0.9)):
        words = words_of(ValueError, lambda given=given: SlowMoConfig(outer_optimizer=given))
        assert "write outer_optimizer=torch.optim.SGD, outer_lr=... and outer_optimizer_kwargs={...}." in words
    for given in (None, 12):
        words = words_of(ValueError, lambda given=given: SlowMoConfig(outer_optimizer=given))
        assert (
            words == f"outer_optimizer must be a name or a class, got {given}. Write outer_optimizer=torch.optim.SGD."
        )
    assert "must name a torch optimizer" in words_of(ValueError, lambda: SlowMoConfig(outer_optimizer=torch.nn.Linear))


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("SGD", "torch.optim.SGD"),
        ("adam", "torch.optim.Adam"),
        ("torch.optim.Sgd", "torch.optim.SGD"),
        ("slow-momentum", "slow_momentum"),
    ],
)
def test_a_misspelt_outer_optimizer(wrong, right):
    words = words_of(ValueError, lambda: SlowMoConfig(outer_optimizer=wrong))
    assert words.endswith(f"Did you mean {right!r}?")


def test_arguments_of_an_outer_optimizer():
    make = functools.partial(SlowMoConfig, outer_optimizer=torch.optim.SGD)
    words = words_of(ValueError, lambda: make(outer_optimizer_kwargs={"momentun": 0.9}))
    assert words.startswith("outer_optimizer_kwargs must be arguments of torch.optim.SGD (momentum, ")
    assert words.endswith("got 'momentun'. Did you mean 'momentum'?")
    assert "must be arguments" in words_of(ValueError, lambda: make(outer_optimizer_kwargs={"params": []}))
    assert "JSON values" in words_of(ValueError, lambda: make(outer_optimizer_kwargs={"momentum": torch.ones(1)}))
    free = SlowMoConfig(outer_optimizer=OwnOuter, outer_optimizer_kwargs={"momentum": 0.5})
    assert free.outer_optimizer_arguments() == {"momentum": 0.5}


# ---- names ----


@pytest.mark.parametrize("wrong", ["sync_evry", "syncEvery", "local_sgd_steps", "H", "tau", "communication_period"])
def test_a_setting_under_another_name(wrong):
    """A misspelling, or what another library calls it; the dictionary is told the same."""
    words = words_of(TypeError, lambda: SlowMoConfig(**{wrong: 24}))
    assert words.startswith(f"unknown settings ['{wrong}']. Did you mean sync_every in place of {wrong}? SlowMoConfig")
    assert words_of(ValueError, lambda: SlowMoConfig.from_dict({wrong: 24})) == words
    assert words_of(TypeError, lambda: SlowMoConfig.local_sgd(**{wrong: 24})) == words
    assert words_of(TypeError, lambda: dataclasses.replace(SlowMoConfig(), **{wrong: 24})) == words


def test_several_wrong_names_and_one_that_nobody_knows():
    words = words_of(TypeError, lambda: SlowMoConfig(beta=0.5, alpha=1, zzz=3))
    assert "Did you mean outer_lr in place of alpha and outer_momentum in place of beta?" in words
    assert "Did you mean" not in words_of(TypeError, lambda: SlowMoConfig(zzz=3))


def test_the_table_of_other_libraries_leads_to_settings_of_ours():
    ours = {f.name for f in dataclasses.fields(SlowMoConfig)}
    assert set(hints.OTHER_NAMES.values()) <= ours
    assert not set(hints.OTHER_NAMES) & ours
    for preset, way in hints.PRESETS.items():
        assert callable(getattr(SlowMoConfig, preset))
        assert isinstance(eval(way), SlowMoConfig)


@pytest.mark.parametrize(
    ("given", "way"),
    [(24, "SlowMoConfig(sync_every=24)"), ("sgp", "SlowMoConfig(base='sgp')"), ({}, "SlowMoConfig(**settings)")],
)
def test_settings_without_a_name(given, way):
    words = words_of(TypeError, lambda: SlowMoConfig(given))
    assert words == f"SlowMoConfig takes its settings by name, got {given!r}. Write {way}."


@pytest.mark.parametrize(
    ("setting", "wrong", "right"),
    [
        ("base", "localsgd", "local_sgd"),
        ("base", "All-Reduce", "all_reduce"),
        ("compression", None, "none"),
        ("inner_state", "maintian", "maintain"),
        ("processes_per_worker", "nodes", "node"),
    ],
)
def test_a_misspelt_choice(setting, wrong, right):
    assert words_of(ValueError, lambda: SlowMoConfig(**{setting: wrong})).endswith(f"Did you mean {right!r}?")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: SlowMoConfig.local_sgd(outer_momentum=0.5),
            "SlowMoConfig.local_sgd sets outer_momentum itself, got outer_momentum=0.5: leave it out, or write "
            "SlowMoConfig(outer_momentum=...) without the preset.",
        ),
        (lambda: SlowMoConfig.local_sgd(outer_lr=0.5), "sets outer_lr itself, got outer_lr=0.5: leave it out"),
        (lambda: SlowMoConfig.lookahead(outer_momentum=0.5), "sets outer_momentum itself, got outer_momentum=0.5"),
        (
            lambda: SlowMoConfig.bmuf(block_momentum=0.9, outer_optimizer=torch.optim.SGD),
            "SlowMoConfig.bmuf sets outer_optimizer itself",
        ),
        (lambda: SlowMoConfig.bmuf(block_momentum=0.9, outer_lr=2), "got outer_lr=2: write block_lr in its place"),
        (lambda: SlowMoConfig.diloco(outer_momentum=0.5), "write nesterov_momentum in its place"),
        (lambda: SlowMoConfig.bmuf(block_momentum="0.9"), "block_momentum must be a finite number, got '0.9'"),
        (lambda: SlowMoConfig.diloco(nesterov_momentum=1), r"nesterov_momentum must be in (0, 1), got 1."),
        (
            lambda: SlowMoConfig.diloco(nesterov_momentum=0),
            "nesterov_momentum must be in (0, 1), got 0. For none write "
            "SlowMoConfig(outer_optimizer=torch.optim.SGD, ...).",
        ),
    ],
)
def test_a_preset_is_given_its_own_setting(make, words):
    assert words in words_of(ValueError, make)


def test_a_presets_own_arguments_are_free():
    assert SlowMoConfig.diloco(outer_lr=0.3).outer_lr == 0.3
    assert SlowMoConfig.lookahead(inner_state="reset").inner_state == "reset"


# ---- numbers ----

WHOLE = ["sync_every", "peers", "staleness", "overlap_steps", "bucket_bytes"]
REAL = ["outer_lr", "outer_momentum", "timeout_seconds"]


def test_every_number_has_the_rule():
    kinds = get_type_hints(SlowMoConfig)
    assert [name for name in kinds if kinds[name] is int] == WHOLE
    assert [name for name in kinds if kinds[name] is float] == REAL


PAGE = Path(__file__).parents[1] / "docs" / "choosing_settings.md"
# A resume may have others: what a checkpoint holds means the same.
FREE = {"outer_lr", "outer_momentum", "outer_optimizer_kwargs", "processes_per_worker", "compression"}
FREE |= {"shard_slow_state", "slow_state_device", "stash_device", "bucket_bytes", "timeout_seconds"}


@pytest.mark.parametrize("name", [field.name for field in fields(SlowMoConfig)])
def test_every_setting_is_told_of_and_fixed_in_a_checkpoint_or_free(name):
    assert f"{name} (`" in (SlowMoConfig.__doc__ or ""), "its docstring has type and default"
    assert f"`{name}" in PAGE.read_text()
    assert (name in _FIXED) != (name in FREE), "say which in checkpoints/state.py, or here"


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("bad", [True, 12.0, "12", None, 2**53, 10**400, -1, np.bool_(True), float("nan"), [12], 2j])
def test_whole_numbers(name, bad):
    words = words_of(ValueError, lambda: SlowMoConfig(base="osgp", **{name: bad}))
    assert words.startswith(f"{name} must be ")
    if bad in (12.0, "12"):
        assert words.endswith(f" Write {name}=12.")


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("bad", [True, "0.5", None, float("nan"), float("inf"), 10**400, -1, 1e39, [0.5], 2j])
def test_real_numbers(name, bad):
    words = words_of(ValueError, lambda: SlowMoConfig(**{name: bad}))
    assert words.startswith(f"{name} must be ")
    assert ("Write" in words) == (bad == "0.5")


def test_numbers_of_numpy_and_torch_are_numbers():
    """And come out as Python's own, which JSON knows."""
    config = SlowMoConfig(
        sync_every=np.int64(24),
        bucket_bytes=torch.tensor(4096),
        outer_lr=np.float32(0.5),
        outer_momentum=np.float64(0.25),
        timeout_seconds=60,
        exact_average=np.bool_(True),
        processes_per_worker=np.int32(2),
    )
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
    assert {type(value) for value in config.to_dict().values()} == {str, int, float, bool, type(None)}
    assert config == SlowMoConfig(
        sync_every=24,
        bucket_bytes=4096,
        outer_lr=0.5,
        outer_momentum=0.25,
        timeout_seconds=60.0,
        processes_per_worker="2",
    )


@pytest.mark.parametrize("bad", [1e15, 1e10, 1.1e9, 0, -3, 1e-4])
def test_timeouts_that_torch_cannot_count(bad):
    words = words_of(ValueError, lambda: SlowMoConfig(timeout_seconds=bad))
    assert words.startswith(f"timeout_seconds must be > 0 seconds (0.001 to 1e9), got {bad}.")


def train_with_the_longest_timeout(sync_every):
    weight = torch.nn.Parameter(torch.tensor([float(torch.distributed.get_rank())]))
    optimizer = SlowMoOptimizer(
        torch.optim.SGD([weight], lr=1.0),
        SlowMoConfig.local_sgd(sync_every, timeout_seconds=1e9, bucket_bytes=2**53 - 1),
    )
    for _ in range(2):
        weight.grad = torch.tensor([1.0 + torch.distributed.get_rank()])
        optimizer.step()
    slowmo_hf.finish(optimizer)
    return weight.item()


@pytest.mark.parametrize("sync_every", [1, 2**53 - 1])
def test_the_largest_numbers_work(sync_every):
    """Both start at rank 0's value, 0; gradients of 1 and 2: -1.5 a step."""
    assert run_workers(train_with_the_longest_timeout, 2, sync_every) == [-3.0, -3.0]


# ---- flags, copies, names of the package ----


def test_choices_have_one_list():
    """The tables hold what the annotations do, and the values of each field are those that the check takes."""
    assert get_args(names.Compression) == ("none", *names.CODES)
    assert get_args(names.TopologyName) == ("auto", *names.TOPOLOGIES)
    kinds = get_type_hints(SlowMoConfig)
    with_choices = {name: get_args(kind) for name, kind in kinds.items() if "Literal" in str(kind)}
    assert list(with_choices) == [
        *("base", "inner_state", "model_buffers", "topology", "compression", "slow_state_device", "stash_device")
    ]
    for name, choices in with_choices.items():
        words = words_of(ValueError, lambda name=name: SlowMoConfig(**{name: "?"}))
        assert words == f"{name} must be one of {', '.join(choices)}, got '?'."


def test_choices_are_those_of_the_flags(capsys):
    parser = HfArgumentParser(SlowMoConfig)
    flags = parser.format_help()
    assert "--base {local_sgd,sgp,osgp,dpsgd,all_reduce}" in flags
    assert "--compression {none,bf16,int8}" in flags
    (parsed,) = parser.parse_args_into_dataclasses(
        ["--base", "sgp", "--topology", "ring", "--processes_per_worker", "2"]
    )
    assert parsed == SlowMoConfig(base="sgp", topology="ring", processes_per_worker=2)
    (parsed,) = parser.parse_args_into_dataclasses(["--outer_optimizer", "torch.optim.SGD"])
    assert parsed == SlowMoConfig(outer_optimizer=torch.optim.SGD)
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses(["--base", "localsgd"])
    assert "argument --base: invalid choice: 'localsgd' (choose from " in capsys.readouterr().err


def test_a_configuration_is_copied_and_pickled():
    config = SlowMoConfig(outer_optimizer=torch.optim.SGD)
    assert pickle.loads(pickle.dumps(config)) == config == dataclasses.replace(config)
    assert dataclasses.replace(config, sync_every=3).sync_every == 3


def test_the_package_lists_its_public_names():
    """`dir` imports no transformers; a star import brings all names."""
    program = """
import sys, slowmo_hf
listed = [name for name in dir(slowmo_hf) if not name.startswith("__")]
assert listed == sorted(slowmo_hf.__all__), listed
assert "__version__" in dir(slowmo_hf) and "__doc__" in dir(slowmo_hf)
assert "transformers" not in sys.modules
from slowmo_hf import *
assert not [name for name in slowmo_hf.__all__ if name not in globals()]
assert SlowMoCallback().config == SlowMoConfig()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_transformers_that_does_not_fit_is_named_with_the_cause():
    """Three tries wrap nothing."""
    program = """
import transformers, slowmo_hf
train = transformers.Trainer.train
del transformers.Trainer._inner_training_loop
for _ in range(3):
    try:
        from slowmo_hf import SlowMoCallback
    except ImportError as error:
        print(error, "|", type(error.__cause__).__name__)
assert transformers.Trainer.train is train
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (told,) = {line for line in done.stdout.splitlines() if line.startswith("SlowMoCallback")}
    assert "does not work with the installed transformers: " in told
    assert "_inner_training_loop" in told
    assert told.endswith("| AttributeError")


def test_a_subclass_of_the_config_keeps_its_own_fields_and_arguments():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Noted(SlowMoConfig):
        note: str = ""

    class Planned(SlowMoConfig):
        def __init__(self, horizon):
            super().__init__(sync_every=horizon // 2)

    assert (Noted(note="a", sync_every=3).note, Noted(sync_every=3).sync_every) == ("a", 3)
    assert Planned(8).sync_every == Planned(horizon=8).sync_every == 4
    with pytest.raises(ValueError, match="sync_every"):
        Noted(sync_every=0)
    with pytest.raises(TypeError, match="Did you mean sync_every"):
        Noted(sync_evry=3)
