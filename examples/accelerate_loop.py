"""
A whole loop under Accelerate: train, evaluate, save and resume, with two workers that average every 12 steps.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/accelerate_loop.py

A small classifier learns the shipped Fashion-MNIST images. With `--resume_from outputs/accelerate_loop/step_200` it
goes on in the middle of the second epoch, and ends on the same weights, bit for bit.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from datasets import load_dataset
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import slowmo_hf
from slowmo_hf import SlowMoConfig, SlowMoOptimizer

IMAGES = Path(__file__).parents[1] / "recipes" / "data" / "fashion_mnist"

parser = argparse.ArgumentParser()
parser.add_argument("--output_dir", default="outputs/accelerate_loop")
parser.add_argument("--resume_from", help="a folder that save_state has written")
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--save_every", type=int, default=100, help="optimizer steps")
args = parser.parse_args()

loaders = DataLoaderConfiguration(use_seedable_sampler=True)  # the order of the rows depends on seed and epoch alone
accelerator = Accelerator(cpu=not torch.cuda.is_available(), dataloader_config=loaders)
set_seed(0)


def rows(split):
    columns = load_dataset(str(IMAGES), split=split).with_format("torch")[:]
    return TensorDataset(columns["image"].flatten(1) / 255, columns["label"])


train_loader = DataLoader(rows("train"), batch_size=32, shuffle=True)
test_loader = DataLoader(rows("test"), batch_size=500)
model = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10))
optimizer = SlowMoOptimizer(torch.optim.AdamW(model.parameters(), lr=2e-3), SlowMoConfig())
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=args.epochs * len(train_loader))
model, optimizer, scheduler, train_loader, test_loader = accelerator.prepare(
    model, optimizer, scheduler, train_loader, test_loader
)


@torch.no_grad()
def accuracy():
    model.eval()  # the last round's model, the same on all ranks: nothing is averaged here
    right = [accelerator.gather_for_metrics(model(x).argmax(1) == y) for x, y in test_loader]
    return torch.cat(right).float().mean().item()


step = 0
if args.resume_from:
    accelerator.load_state(args.resume_from)  # every worker's own weights and optimizer, and the random generators
    step = int(Path(args.resume_from).name.removeprefix("step_"))
for epoch in range(step // len(train_loader), args.epochs):
    model.train()  # this worker's own weights are back
    train_loader.set_epoch(epoch)
    for x, y in accelerator.skip_first_batches(train_loader, step % len(train_loader)):
        accelerator.backward(nn.functional.cross_entropy(model(x), y))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        step += 1
        if step % args.save_every == 0:
            accelerator.save_state(f"{args.output_dir}/step_{step}")
    accelerator.print(f"epoch {epoch}: accuracy {accuracy():.4f} after {slowmo_hf.last_round(optimizer).round} rounds")
slowmo_hf.finish(optimizer)  # the average of all workers stays in the model
accelerator.print(f"final accuracy {accuracy():.4f}")
accelerator.save_model(model, args.output_dir)
accelerator.end_training()
