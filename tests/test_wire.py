"""The wire between rounds is quiet: counted by the profiler, and by the clock of a rank whose neighbour sleeps."""

import tempfile
import time
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

import slowmo_hf
from harness import run_workers
from slowmo_hf import SlowMoCallback, SlowMoConfig, SlowMoOptimizer
from tiny import Rows, SmallNorm, bert, sentences

TAU = 4
COLLECTIVES = (
    "all_reduce",
    "allreduce",
    "broadcast",
    "all_gather",
    "allgather",
    "reduce_scatter",
    "barrier",
    "send",
    "recv",
    "all_to_all",
)


def _count(prof):
    """{name: calls} of what gloo ran, and the bytes that went in."""
    calls, moved = {}, 0
    for event in prof.events():
        if event.name.startswith("gloo:") and any(word in event.name for word in COLLECTIVES):
            calls[event.name] = calls.get(event.name, 0) + 1
            for shape in event.input_shapes:
                elements = 1
                for size in shape:
                    elements *= size
                moved += elements if shape else 0
    return calls, moved


class _StepProfiler:
    """One profile per optimizer step."""

    def __init__(self):
        self.steps, self.prof = [], None

    def begin(self):
        self.prof = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
        self.prof.__enter__()

    def end(self):
        if self.prof is not None:
            self.prof.__exit__(None, None, None)
            self.steps.append(_count(self.prof))
            self.prof = None


def _arguments(**settings):
    from transformers import TrainingArguments

    return TrainingArguments(
        tempfile.mkdtemp(),
        **{
            "per_device_train_batch_size": 4,
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            **settings,
        },
    )


def _trainer_steps(kind, accumulation, config):
    """Collectives of every optimizer step of a stock Trainer; without a config, of DDP."""
    from transformers import Trainer, TrainerCallback

    profiler = _StepProfiler()

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            profiler.end()
            profiler.begin()

        def on_train_end(self, args, state, control, **kwargs):
            profiler.end()

    model, data = (bert(), sentences()) if kind == "bert" else (SmallNorm(), Rows(64, torch.float32))
    callbacks = [Watch(), *([SlowMoCallback(config)] if config else [])]
    args = _arguments(max_steps=10, gradient_accumulation_steps=accumulation)
    Trainer(model=model, args=args, train_dataset=data, callbacks=callbacks).train()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return profiler.steps, trainable


def _accelerate_steps(config):
    """The same in a custom loop with accumulation: the first forward pass is inside no_sync."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    bare, rows, profiler = SmallNorm(), Rows(400, torch.float32), _StepProfiler()
    optimizer = torch.optim.SGD(bare.parameters(), lr=0.1, momentum=0.9)
    model, optimizer = accelerator.prepare(bare, SlowMoOptimizer(optimizer, config) if config else optimizer)
    for micro in range(20):
        if micro % 2 == 0:
            profiler.begin()
        with accelerator.accumulate(model):
            accelerator.backward(model(rows.x[micro * 4 : micro * 4 + 4], rows.y[micro * 4 : micro * 4 + 4])["loss"])
            optimizer.step()
            optimizer.zero_grad()
        if micro % 2:
            profiler.end()
    return profiler.steps, sum(p.numel() for p in bare.parameters())


def _all_counts():
    config = SlowMoConfig(sync_every=TAU)
    return {
        "bert": _trainer_steps("bert", 1, config),
        "bert, accumulation": _trainer_steps("bert", 2, config),
        "norm": _trainer_steps("norm", 1, config),
        "accelerate, norm, accumulation": _accelerate_steps(config),
        "stock bert": _trainer_steps("bert", 1, None),
        "stock accelerate": _accelerate_steps(None),
    }


@pytest.mark.slow
def test_no_collective_between_rounds_and_a_round_moves_what_theory_says():
    for counts in run_workers(_all_counts, 2):
        for name, (steps, trainable) in counts.items():
            assert len(steps) == 10, name
            if name.startswith("stock"):
                assert all(calls for calls, _ in steps), f"the counter sees nothing in {name}"
                continue
            for number, (calls, elements) in enumerate(steps[:9], start=1):  # the tenth ends in a look
                if number > 1 and number % TAU:
                    assert not calls, (name, number, calls)
                if number % TAU == 0:
                    norm = 11 if "norm" in name else 0  # running mean and variance, num_batches_tracked
                    header = elements - trainable - 1 - norm  # one element more: the consensus distance rides along
                    assert 0 < header * 8 <= 1024, (name, number, elements, trainable, calls)
                    assert sum(calls.values()) == (4 if norm else 2), (name, calls)


def _completion_times(kind, config):
    """When each of 6 steps ended on this rank; rank 1 sleeps 0.25 s in every step."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    static = DistributedDataParallelKwargs(static_graph=True) if kind == "static_graph" else None
    accelerator = Accelerator(cpu=True, kwargs_handlers=[static] if static else [], gradient_accumulation_steps=2)
    bare, rows = SmallNorm(), Rows(400, torch.float32)
    optimizer = torch.optim.SGD(bare.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(bare, SlowMoOptimizer(optimizer, config) if config else optimizer)
    times, start = [], None
    for _step in range(6):
        for _ in range(1 if kind == "static_graph" else 2):
            with accelerator.accumulate(model) if kind != "static_graph" else nullcontext():
                loss = model(rows.x[:4], rows.y[:4])["loss"]
                if start is None:
                    dist.barrier()
                    start = time.perf_counter()
                if dist.get_rank() == 1:
                    time.sleep(0.25)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    return times


def _trainer_times(config):
    from transformers import Trainer, TrainerCallback

    times = []

    class Sleep(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            times.append(time.perf_counter())

        def on_step_end(self, args, state, control, **kwargs):
            times.append(time.perf_counter())
            if dist.get_rank() == 1:
                time.sleep(0.5)

    callbacks = [SlowMoCallback(config), Sleep()] if config else [Sleep()]
    Trainer(model=bert(), args=_arguments(max_steps=6), train_dataset=sentences(), callbacks=callbacks).train()
    return [t - times[0] for t in times[1:]]


def _all_times():
    config = SlowMoConfig(sync_every=6)
    return {
        "accumulation": _completion_times("accumulation", config),
        "static_graph": _completion_times("static_graph", config),
        "trainer": _trainer_times(config),
        "stock trainer": _trainer_times(None),
    }


@pytest.mark.slow
def test_nobody_waits_for_a_sleeping_rank_before_the_round():
    awake, _ = run_workers(_all_times, 2)
    assert awake["stock trainer"][4] > 1.5, "the control: DDP waits for the sleeper at every step"
    for name in ("accumulation", "static_graph", "trainer"):
        assert awake[name][4] < 1.0, (name, awake[name])  # five local steps while the other sleeps at least 1.25 s
        assert awake[name][5] > 1.2, (name, awake[name])  # the round, where it must wait


@pytest.mark.parametrize("workers", [2, 3])
def test_bytes_sent_is_the_ring_of_the_payload(workers):
    for report, trainable in run_workers(_one_report, workers):
        header, ring = 11 * 8 * (workers - 1), 2 * (workers - 1) / workers
        assert report.bytes_sent == pytest.approx(ring * 4 * (trainable + 1) + header, abs=4)


def _one_report():
    from slowmo_hf import last_round

    rows = Rows(8, torch.float32)
    model = torch.nn.Linear(4, 1)
    optimizer = SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), SlowMoConfig(sync_every=1))
    (model(rows.x) - rows.y).square().mean().backward()
    optimizer.step()
    return last_round(optimizer), sum(p.numel() for p in model.parameters())


# ---- the profiler ----


def _labels(config):
    """How often each of the package's labels is in a profile of nine steps and a look inside a round."""
    weight = torch.nn.Parameter(torch.arange(6.0))
    optimizer = SlowMoOptimizer(torch.optim.SGD([weight], lr=0.1), config)
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        for step in range(9):
            weight.grad = weight.detach() - dist.get_rank() * step
            optimizer.step()
        with slowmo_hf.consensus(optimizer):
            pass
    names = [event.name.removeprefix("slowmo::") for event in prof.events() if event.name.startswith("slowmo::")]
    return {name: names.count(name) for name in sorted(set(names))}


ROUNDS = {"round": 2, "status": 3, "consensus": 1}
LABELS = {
    "plain": (SlowMoConfig(sync_every=TAU), ROUNDS | {"apply": 2}),
    "overlapped": (SlowMoConfig(sync_every=TAU, overlap_steps=2), ROUNDS | {"launch": 2, "apply": 1}),
    "gossip": (SlowMoConfig(base="sgp", sync_every=TAU), ROUNDS | {"apply": 2, "exchange": 7}),
}


def _all_labels():
    return {name: _labels(config) for name, (config, _) in LABELS.items()}


def test_the_profiler_shows_rounds_exchanges_and_looks_by_name():
    """Nine steps, a round every four: two rounds, the second overlapped one in flight at the end; seven exchanges."""
    for found in run_workers(_all_labels, 2):
        assert found == {name: counts for name, (_, counts) in LABELS.items()}
