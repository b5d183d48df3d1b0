"""
A GAN on two workers: two models, two optimizers, a SlowMoOptimizer around each.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/gan.py

The generator learns points on a ring of radius 2. All ranks step the optimizers in the same order; each optimizer has
rounds of its own, and `accelerator.save_state` saves both.
"""

import argparse
import math

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

import slowmo_hf
from slowmo_hf import SlowMoConfig, SlowMoOptimizer

parser = argparse.ArgumentParser()
parser.add_argument("--output_dir", default="outputs/gan")
parser.add_argument("--steps", type=int, default=1000)
args = parser.parse_args()

accelerator = Accelerator(cpu=not torch.cuda.is_available())
device = accelerator.device
config = SlowMoConfig(sync_every=12)
set_seed(0)  # the same first weights on all ranks


def network(outputs):
    return nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, outputs))


def slow(model, lr):
    return SlowMoOptimizer(torch.optim.Adam(model.parameters(), lr=lr, betas=(0.5, 0.9)), config)


def ring(rows):
    angle = 2 * math.pi * torch.rand(rows, device=device)
    return 2 * torch.stack([angle.cos(), angle.sin()], dim=1) + 0.05 * torch.randn(rows, 2, device=device)


def noise(rows):
    return torch.randn(rows, 2, device=device)


def says(judged, real):
    return nn.functional.binary_cross_entropy_with_logits(judged, torch.full_like(judged, float(real)))


generator, judge = network(2), network(1)
generator, judge, generator_optimizer, judge_optimizer = accelerator.prepare(
    generator, judge, slow(generator, lr=1e-3), slow(judge, lr=2e-3)
)
set_seed(1, device_specific=True)  # other points and other noise on each rank
for _ in range(args.steps):
    accelerator.backward(says(judge(ring(64)), True) + says(judge(generator(noise(64)).detach()), False))
    judge_optimizer.step()
    judge_optimizer.zero_grad()

    judge.requires_grad_(False)
    accelerator.backward(says(judge(generator(noise(64))), True))
    judge.requires_grad_(True)
    generator_optimizer.step()
    generator_optimizer.zero_grad()
slowmo_hf.finish(judge_optimizer)
slowmo_hf.finish(generator_optimizer)  # both models are averages now, the same on all ranks

with torch.no_grad():
    radius = generator(noise(2000)).norm(dim=1)
accelerator.print(f"radius of generated points: {radius.mean():.2f} ± {radius.std():.2f} (of the data: 2.00 ± 0.05)")
accelerator.save_model(generator, f"{args.output_dir}/generator")
accelerator.save_model(judge, f"{args.output_dir}/judge")
accelerator.end_training()
