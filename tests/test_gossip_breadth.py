"""What people do with Trainer and Accelerate under the gossip bases: looks, one process, worlds of 3 and 4, logs."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.optim import SGD, AdamW
from transformers import Trainer, TrainerCallback

from gossip_runs import (
    BASES,
    LR,
    STEPS,
    TAU,
    average_of_held,
    close,
    equal_parameters,
    follow_gossip,
    gossip,
    loop,
    rank,
    run,
    some_rows,
)
from harness import run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig
from slowmo_hf.wire.gossip import make_topology
from tiny import (
    Heard,
    Recorder,
    Regression,
    Rows,
    SmallNorm,
    arguments,
    bert,
    equal,
    mean,
    recorded,
    sentences,
    values,
)

# ---- the two surfaces ----


def some_sentences(count=4):
    data = sentences(64)

    def batch(micro):
        chosen = [data[(micro * dist.get_world_size() + rank()) * count % 60 + i] for i in range(count)]
        return {key: torch.stack([row[key] for row in chosen]) for key in chosen[0]}

    return batch


# ---- 1. looks ----


SAVES = {"osgp 2": 1}  # after every step there, after every third elsewhere


def check_trainer_looks(folder):
    out = {}
    for name, config in BASES.items():
        often = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": SAVES.get(name, 3)}
        alone = run(f"{folder}/alone", config, bert(dropout=0.1), sentences())
        out[name] = alone, run(f"{folder}/{name}", config, bert(dropout=0.1), sentences(), **often)
    return out


def check_accelerate_looks():
    out = {}
    for name, config in BASES.items():
        out[name] = [loop(config, bert(dropout=0.1), some_sentences(), look=look, held=look) for look in (False, True)]
    return out


def compare_looks(name, alone, watched, averages):
    for one, other in zip(alone, watched, strict=True):
        for step, (left, right) in enumerate(zip(one["after"], other["after"], strict=True), start=1):
            assert equal(left, right), f"{name}: a look changed step {step}"
        assert equal(one["final"], other["final"])
    for step in range(1, STEPS + 1):
        shown = watched[0]["evaluated"][step]
        for other in watched:
            assert equal(other["evaluated"][step], shown), f"{name}, step {step}: ranks were shown different averages"
        for parameter, right in averages[step - 1].items():
            close(shown[parameter], right, f"{name}, step {step}: what was shown")
        one = alone[0]["after"][step - 1]
        agree = step % TAU == 0 and name != "osgp, no average"
        assert equal_parameters(one, shown, watched[0]["trained"]) == agree, (
            f"{name}, step {step}: workers must differ for this to tell"
        )


@pytest.mark.slow
def test_trainers_looks_show_the_average_and_leave_no_trace(tmp_path):
    ranks = run_workers(check_trainer_looks, 3, str(tmp_path))
    model = bert()
    for name, config in BASES.items():
        alone, watched = ([out[name][which] for out in ranks] for which in (0, 1))
        compare_looks(name, alone, watched, follow_gossip(alone, config))
        assert watched[0]["saved"] == sorted({*range(SAVES.get(name, 3), STEPS, SAVES.get(name, 3)), STEPS})
        for step in watched[0]["saved"]:
            saved = load_file(f"{tmp_path}/{name}/checkpoint-{step}/model.safetensors")
            model.load_state_dict(saved, strict=True)
            assert equal(saved, watched[0]["evaluated"][step]), "what was saved is what was shown"


@pytest.mark.slow
def test_accelerates_looks_show_the_average_and_leave_no_trace():
    ranks = run_workers(check_accelerate_looks, 3)
    for name, config in BASES.items():
        alone, watched = ([out[name][which] for out in ranks] for which in (0, 1))
        compare_looks(name, alone, watched, follow_gossip(alone, config))
        follow_gossip(watched, config)
        compare_looks(name, alone, watched, [average_of_held(watched, step) for step in range(1, STEPS + 1)])
        most = {"sgp": 0, "osgp": 1, "osgp 2": 2, "dpsgd": 0, "osgp, no average": 1}[name]
        assert max(state["in_flight"] for state in watched[0]["held"]) == most


def check_statistics(folder):
    """BatchNorm: statistics are averaged at exact rounds and looks, and not by exchanges."""
    cases = {name: BASES[name] for name in ("osgp", "dpsgd", "osgp, no average")}
    settings = {"eval_strategy": "steps", "eval_steps": 1}
    return {
        name: run(folder, config, SmallNorm(), Rows(160, torch.float32), **settings) for name, config in cases.items()
    }


@pytest.mark.slow
def test_batch_norm_statistics_are_averaged_at_rounds_and_looks(tmp_path):
    ranks = run_workers(check_statistics, 3, str(tmp_path))
    for name in ranks[0]:
        runs = [out[name] for out in ranks]
        follow_gossip(runs, BASES[name])
        for step in range(1, STEPS + 1):
            for statistic in ("norm.running_mean", "norm.running_var"):
                before, after = ([run_[when][step - 1] for run_ in runs] for when in ("stepped", "after"))
                right = mean(before, statistic)
                for mine_before, mine_after, run_ in zip(before, after, runs, strict=True):
                    close(run_["evaluated"][step][statistic], right, f"{name}, step {step}: {statistic}")
                    if step % TAU == 0 and BASES[name].exact_average:
                        close(mine_after[statistic], right, f"{name}, round at step {step}: {statistic}")
                    else:
                        assert torch.equal(mine_after[statistic], mine_before[statistic])
        assert torch.equal(runs[0]["final"]["floor"], torch.full((2,), torch.finfo(torch.float32).min))


# ---- 6. one process ----


def check_one_process(folder):
    """Plain SGD, every base without an outer update, every base with slow momentum, Local SGD with slow momentum."""
    make, out = (lambda parameters: SGD(parameters, lr=LR)), {}
    configs = {
        **BASES,
        "two-sided ring": gossip("dpsgd", topology="ring"),
        "complete": gossip("sgp", topology="complete"),
    }
    for name, config in {**configs, "local": SlowMoConfig(sync_every=TAU)}.items():
        for beta in (0.0, 0.5):
            settings = {**config.to_dict(), "outer_momentum": beta}
            own = SlowMoConfig.from_dict(settings)
            with Heard() as heard:
                runs = [
                    run(
                        folder,
                        own,
                        Regression(),
                        Rows(160),
                        optimizer=make,
                        lr_scheduler_type="constant",
                        eval_strategy="steps",
                        eval_steps=3,
                    ),
                    loop(own, Regression(), some_rows(4), optimizer=make, look=True),
                ]
            out[name, beta] = (
                [run_["final"] for run_ in runs],
                len(heard.about("one worker: nothing is averaged", "WARNING")),
            )
    model, batch, recorder = Regression(), some_rows(4), Recorder()
    optimizer = make(model.parameters())
    for micro in range(STEPS):
        optimizer.zero_grad()
        model(**batch(micro))["loss"].backward()
        optimizer.step()
    trainer = Trainer(
        model=Regression(),
        args=arguments(folder, max_steps=STEPS, lr_scheduler_type="constant"),
        train_dataset=Rows(160),
        callbacks=[recorder],
    )
    trainer.optimizer = make(trainer.model.parameters())
    trainer.train()
    return out, [recorded(trainer, recorder)["final"], values(model)]


def test_one_process_is_the_base_optimizer_and_is_warned(tmp_path):
    [(out, plain)] = run_workers(check_one_process, 1, str(tmp_path))
    for (name, beta), (finals, warned) in out.items():
        assert warned == 2, "once by each surface"
        for ours, stock, local in zip(finals, plain, out["local", beta][0], strict=True):
            for parameter in stock:
                close(ours[parameter], local[parameter], f"{name}, {beta}: {parameter}")
                if beta == 0:
                    close(ours[parameter], stock[parameter], f"{name}: {parameter}")
                else:
                    assert not torch.allclose(ours[parameter], stock[parameter], rtol=1e-3)


# ---- 7. worlds of 3 and 4 ----


TOPOLOGIES = {
    "sgp, exponential": gossip("sgp"),
    "sgp, bipartite": gossip("sgp", topology="bipartite_exponential"),
    "sgp, ring of two peers": gossip("sgp", topology="ring", peers=2, exact_average=False),
    "osgp, bipartite": gossip("osgp", 9, topology="bipartite_exponential", staleness=2),
    "osgp, complete": gossip("osgp", 9, topology="complete", staleness=3),
    "dpsgd, bipartite": gossip("dpsgd"),
    "dpsgd, ring": gossip("dpsgd", 9, topology="ring"),
}


def check_topologies():
    adam = lambda parameters: AdamW(parameters, lr=0.02)  # noqa: E731
    return {
        name: loop(config, Regression(), some_rows(3), optimizer=adam, steps=12, look=True, held=True)
        for name, config in TOPOLOGIES.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("workers", [3, 4])
def test_every_topology_in_small_worlds(workers):
    ranks = run_workers(check_topologies, workers)
    for name, config in TOPOLOGIES.items():
        runs = [out[name] for out in ranks]
        averages = follow_gossip(runs, config)
        topology = make_topology(config, workers)
        idles = any(not topology.targets(worker, number) for worker in range(workers) for number in range(12))
        assert idles == (workers == 3 and ("bipartite" in name or name == "dpsgd, ring")), name
        for step, shown in runs[0]["evaluated"].items():
            for parameter, right in averages[step - 1].items():
                close(shown[parameter], right, f"{name}, step {step}: {parameter}")
        weights = {round(state["w"], 9) for run_ in runs for state in run_["held"]}
        assert (weights == {1.0}) == (config.base != "osgp"), name


# ---- 10. logs ----


class Reports(TrainerCallback):
    """The report of every round; after SlowMoCallback."""

    def __init__(self):
        self.ours, self.reports = None, []

    def on_optimizer_step(self, args, state, control, **kwargs):
        if (state.global_step + 1) % self.ours.config.sync_every == 0:
            self.reports.append(self.ours.last_round)


LOGS = {
    **BASES,
    "sgp, no average": gossip("sgp", exact_average=False),
    "sgp, two peers": gossip("sgp", peers=2),
    "sgp alone": gossip("sgp", exact_average=False, outer_momentum=0),
}


def check_logs(folder):
    out = {}
    for name, config in LOGS.items():
        ours, reports = SlowMoCallback(config), Reports()
        reports.ours = ours
        model = Regression(torch.float32)
        settings = {
            "logging_strategy": "steps",
            "logging_steps": 2 * TAU,
            "eval_strategy": "steps",
            "eval_steps": 3,
            "max_steps": 3 * TAU + 1,
        }
        trainer = Trainer(
            model=model,
            args=arguments(folder, learning_rate=1e-2, **settings),
            train_dataset=Rows(160, torch.float32),
            eval_dataset=Rows(8, torch.float32),
            callbacks=[ours, reports],
        )
        trainer.train()
        elements = sum(p.numel() for p in model.parameters())
        out[name] = trainer.state.log_history, reports.reports, elements, len(trainer.optimizer.param_groups)
    return out


@pytest.mark.slow
def test_logs_of_a_gossip_run(tmp_path):
    ranks = run_workers(check_logs, 3, str(tmp_path))
    for name, config in LOGS.items():
        topology = make_topology(config, 3)
        for me, (history, reports, elements, groups) in enumerate(out[name] for out in ranks):
            slow = [entry for entry in history if "slowmo/round" in entry]
            assert [(e["step"], e["slowmo/round"]) for e in slow] == [(8, 2), (13, 3)]
            number, right = 0, []
            for _ in range(3):
                exchanges = TAU - 1 if config.exact_average else TAU
                message = 4 * elements + (8 if config.base == "osgp" else 0)
                sent = sum(message * len(topology.targets(me, number + i)) for i in range(exchanges))
                number += exchanges
                ring = round(2 * 2 / 3 * 4 * (elements + 1)) if config.exact_average else 0
                right.append(sent + ring + 2 * 8 * (10 + groups))
            assert [report.bytes_sent for report in reports] == right, f"{name}, worker {me}: looks do not count"
            assert [entry["slowmo/bytes_sent"] for entry in slow] == [right[0] + right[1], right[2]]
            for entry, report in zip(slow, (reports[1], reports[2]), strict=True):
                assert ("slowmo/consensus_distance" in entry) == config.exact_average
                assert (report.consensus_distance is None) != config.exact_average
                numbers = {key: value for key, value in entry.items() if key.startswith("slowmo/")}
                assert all(math.isfinite(value) for value in numbers.values()), numbers
                for key in ("pseudo_grad_norm", *(["velocity_norm"] if config.outer_momentum else []), "seconds"):
                    assert numbers[f"slowmo/{key}"] > 0, (name, key)
                assert 0 < numbers["slowmo/utilisation"] < 1
                assert json.loads(json.dumps(entry, allow_nan=False)) == entry
            json.dumps(history, allow_nan=False)
