"""Gossip with parameters of every kind, and adapters."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from gossip_runs import BASES, THREE, average_of_held, close, follow_gossip, gossip, loop, rank, run, some_rows
from harness import run_workers
from slowmo_hf.wire.gossip import make_topology
from tiny import (
    Rows,
    bert,
    sentences,
)

# ---- 4. parameters of every kind ----


class Zoo(nn.Module):
    """Frozen, tied, unused, rarely used, 0-dim, empty, channels-last, fp64; more than one message of 1024 bytes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(11)
        self.wide = nn.Linear(4, 90)
        self.conv = nn.Conv2d(2, 6, 2).to(memory_format=torch.channels_last)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.one, self.other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.other.weight = self.one.weight
        self.unused = nn.Parameter(torch.randn(3))
        self.rare = nn.Parameter(torch.randn(2, 2))
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.empty, self.empty_double = (
            nn.Parameter(torch.empty(0, 3)),
            nn.Parameter(torch.empty(2, 0, dtype=torch.float64)),
        )
        self.precise = nn.Linear(4, 3).double()
        self.forwards = 0

    def forward(self, x, labels):
        self.forwards += 1
        h = self.other(torch.tanh(self.one(x + self.frozen(x))))
        out = (
            self.conv(self.wide(h)[:, :8].view(-1, 2, 2, 2)).flatten(1).mean(1, keepdim=True) * self.scalar
            + self.empty.sum()
        )
        if self.forwards % 3 == rank():  # on one rank at a time
            out = out + self.rare.sum()
        precise = self.precise(x.double()).square().mean() + self.empty_double.sum()
        return {"loss": (out - labels).square().mean() + precise + self.wide(x).square().mean()}


ZOO = {
    **{
        name: gossip(c.base, staleness=c.staleness, exact_average=c.exact_average, bucket_bytes=1024)
        for name, c in BASES.items()
    },
    "osgp, two peers": gossip("osgp", staleness=3, peers=2, bucket_bytes=1024, sync_every=6),
    "sgp, complete": gossip("sgp", topology="complete"),
}


def check_zoo(folder):
    out = {}
    for name, config in ZOO.items():
        model = Zoo()
        assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
        assert not model.conv.weight.is_contiguous()
        adam = lambda parameters: AdamW([p for p in parameters if p.requires_grad], lr=0.05)  # noqa: E731
        by_loop = loop(config, model, some_rows(4, torch.float32), optimizer=adam, look=True, held=True)
        assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
        settings = {"ddp_find_unused_parameters": True, "eval_strategy": "steps", "eval_steps": 3}
        out[name] = [by_loop]
        if name in THREE:
            out[name].append(run(folder, config, Zoo(), Rows(160, torch.float32), held=True, **settings))
    return out


@pytest.mark.slow
def test_parameters_of_every_kind_are_mixed_once(tmp_path):
    ranks = run_workers(check_zoo, 3, str(tmp_path))
    for name, config in ZOO.items():
        for runs in zip(*[out[name] for out in ranks], strict=True):
            averages = follow_gossip(runs, config)
            trained, start = runs[0]["trained"], runs[0]["start"]
            assert len(trained) == 12
            for step, shown in runs[0]["evaluated"].items():
                for parameter, right in average_of_held(runs, step).items():
                    close(shown[parameter], right, f"{name}, step {step}: {parameter}")
                    close(
                        averages[step - 1][parameter].to(start[parameter].dtype),
                        right,
                        f"{name}, step {step}: {parameter}",
                    )
            for run_ in runs:
                for after in [*run_["after"], run_["final"]]:
                    assert torch.equal(after["one.weight"], after["other.weight"])
                    for constant in ("frozen.weight", "frozen.bias"):
                        assert torch.equal(after[constant], start[constant])
                    assert after["empty"].shape == (0, 3)
                    assert after["empty_double"].shape == (2, 0)
                for changed in set(trained) - {"unused", "empty", "empty_double"}:
                    assert not torch.equal(run_["final"][changed], start[changed]), changed
                close(run_["final"]["unused"], start["unused"], "no gradient, no change")
            assert not torch.equal(runs[0]["stepped"][0]["rare"], runs[1]["stepped"][0]["rare"]), (
                "used on one rank alone"
            )
            payload = sum(start[parameter].numel() * start[parameter].element_size() for parameter in trained)
            one_exchange(runs, config, payload)


def one_exchange(runs, config, payload):
    """
    Every exchange sends the payload to each of this step's peers, and osgp its weight; an exact round sends none.
    """
    topology = make_topology(config, len(runs))
    message = payload + (8 if config.base == "osgp" else 0)
    for me, run_ in enumerate(runs):
        number, sent = 0, 0
        for step, total in enumerate(run_["exchanged"], start=1):
            if step % config.sync_every or not config.exact_average:
                sent += message * len(topology.targets(me, number))
                number += 1
            assert total == sent, (config.base, me, step)


# ---- 5. PEFT ----


def lora():
    from peft import LoraConfig, TaskType, get_peft_model

    torch.manual_seed(8)
    return get_peft_model(
        bert(), LoraConfig(task_type=TaskType.SEQ_CLS, r=2, lora_alpha=4, target_modules=["query", "value"])
    )


LORA = {**{name: BASES[name] for name in THREE}, "sgp, two peers": gossip("sgp", peers=2)}


def check_lora(folder):
    out = {}
    for name, config in LORA.items():
        model = lora()
        elements = [sum(p.numel() for p in model.parameters() if p.requires_grad or every) for every in (False, True)]
        settings = {"save_strategy": "steps", "save_steps": 3, "learning_rate": 3e-2}
        out[name] = run(f"{folder}/{name}", config, model, sentences(), held=True, **settings), *elements
    return out


@pytest.mark.slow
def test_lora_exchanges_adapters_only(tmp_path):
    from peft import PeftModel

    ranks = run_workers(check_lora, 3, str(tmp_path))
    for name, config in LORA.items():
        runs, (_, adapters, everything) = [out[name][0] for out in ranks], ranks[0][name]
        assert adapters < everything / 10
        averages = follow_gossip(runs, config)
        one_exchange(runs, config, 4 * adapters)
        for run_ in runs:
            assert all(
                torch.equal(run_["final"][key], run_["start"][key])
                for key in run_["start"]
                if key not in run_["trained"]
            )
        for step in (3, 6, 9):
            loaded = PeftModel.from_pretrained(bert(), f"{tmp_path}/{name}/checkpoint-{step}").state_dict()
            for parameter, right in averages[step - 1].items():
                close(loaded[parameter], right, f"{name}, checkpoint {step}: {parameter}")
