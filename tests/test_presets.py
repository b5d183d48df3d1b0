"""
The paper's image rows: every number of a preset, the schedule's values, ResNet-18's size, residual branches that start
at 0.
"""

from __future__ import annotations

import pytest
import torch

from image import presets as image_presets
from image import train as image_classification
from image.small_resnet import make_model

LABELS = [str(number) for number in range(10)]


def test_resnet18_is_cifars():
    """11,173,962 parameters: the ImageNet one has a 7x7 stem and 1,000 classes. Stages at 32, 16, 8 and 4 pixels."""
    model = make_model(32, 3, LABELS, architecture="resnet18")
    assert sum(p.numel() for p in model.parameters()) == 11_173_962
    states = model(torch.zeros(1, 3, 32, 32), output_hidden_states=True).hidden_states
    assert [tuple(state.shape[1:]) for state in states[1:]] == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]


@pytest.mark.parametrize(("architecture", "branches"), [("small", 3), ("resnet18", 8)])
def test_residual_branches_start_at_zero(architecture, branches):
    model = make_model(32, 3, LABELS, 4, architecture)
    assert image_presets.zero_last_norms(model) == branches
    names = [name for name, p in model.named_parameters() if "normalization.weight" in name and bool((p == 0).all())]
    assert len(names) == branches
    assert all(".layer.1." in name for name in names), "the second of a basic block's convolutions"


@pytest.mark.parametrize(
    ("task", "processes", "total", "epochs", "decays", "gossip_period", "rate"),
    [("cifar10", 32, 4096, 200, [100, 150, 175], 12, 1.6), ("imagenet", 256, 8192, 90, [30, 60, 80], 48, 3.2)],
)
@pytest.mark.parametrize("base", ["local_sgd", "sgp", "osgp", "all_reduce"])
@pytest.mark.parametrize("slowmo", [False, True])
def test_presets_are_the_papers(tmp_path, task, processes, total, epochs, decays, gossip_period, rate, base, slowmo):
    """
    Batches of 4,096 and 8,192 images; 0.1 per 256 of them. Gossip without slow momentum has no exact average. Explicit
    flags win.
    """
    flags = [
        "--preset",
        task,
        "--base",
        base,
        *([] if slowmo else ["--outer_momentum", "0"]),
        "--output_dir",
        str(tmp_path),
    ]
    script, config, args = image_classification.parse(flags)
    assert args.per_device_train_batch_size * processes == total
    assert (args.num_train_epochs, script.decay_epochs, script.warmup_epochs) == (epochs, decays, 5)
    assert args.learning_rate == pytest.approx(rate) == pytest.approx(0.1 * total / 256)
    assert (args.optim, args.weight_decay, script.inner_momentum) == ("sgd", 1e-4, 0.9)
    assert config.sync_every == (gossip_period if "sgp" in base else 12)
    assert config.exact_average == (slowmo or "sgp" not in base)
    assert (config.outer_lr, config.outer_momentum) == (1, 0.6 if slowmo else 0)
    assert config.inner_state == ("reset" if slowmo or base == "local_sgd" else "auto")
    assert script.zero_init_residual == (task == "imagenet")
    assert script.architecture == {"cifar10": "resnet18", "imagenet": "resnet50"}[task]
    _, config, args = image_classification.parse([*flags, "--learning_rate", "0.5", "--sync_every", "7"])
    assert (args.learning_rate, config.sync_every) == (0.5, 7)


def test_step_decay_in_numbers():
    """10 steps an epoch, warm-up over 2 epochs, decays at 4 and 6: a twentieth of the rate at first."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = image_presets.step_decay(optimizer, 10, 2.0, [4, 6])
    rates = []
    for _ in range(80):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.1)
    assert rates[19] == rates[39] == 2.0
    assert [rates[step] for step in (40, 59, 60, 79)] == pytest.approx([0.2, 0.2, 0.02, 0.02])


def test_warmup_epochs_alone_are_refused(capsys):
    with pytest.raises(SystemExit, match="warmup_epochs is for --decay_epochs"):
        image_classification.parse(["--warmup_epochs", "2"])
