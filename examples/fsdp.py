"""
Two workers of two processes each: FSDP2 shards the model inside a worker, and the workers average every 12 steps.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 4 examples/fsdp.py

On GPUs a worker is a machine: `--shards 8` on machines of eight. Gradients are averaged inside a worker at every step,
and nothing is sent between workers until a round. Under `accelerate launch` a configuration file shards the model in
place of `fully_shard`: docs/fsdp.md.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import load_dataset
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler
from transformers import LlamaConfig, LlamaForCausalLM

import slowmo_hf
from slowmo_hf import SlowMoConfig, SlowMoOptimizer

HELP_TEXT = Path(__file__).parents[1] / "recipes" / "data" / "en_de_help"

parser = argparse.ArgumentParser()
parser.add_argument("--output_dir", default="outputs/fsdp")
parser.add_argument("--shards", type=int, default=2, help="processes of a worker")
parser.add_argument("--steps", type=int, default=50)
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cuda":
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group()
rank, processes = dist.get_rank(), dist.get_world_size()

torch.manual_seed(0)  # the same first weights on all ranks
size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **size)).to(device)
mesh = init_device_mesh(device, (processes // args.shards, args.shards), mesh_dim_names=("replicate", "shard"))
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
held = sum(p.to_local().numel() for p in model.parameters())
optimizer = SlowMoOptimizer(torch.optim.AdamW(model.parameters(), lr=5e-3), SlowMoConfig(sync_every=12))

pairs = load_dataset(str(HELP_TEXT), split="train[:4000]")["translation"]
text = "\n".join(pair["en"] for pair in pairs).encode()
blocks = torch.tensor(list(text[: len(text) // 64 * 64])).view(-1, 64)  # a token per byte, 64 to a row
sampler = DistributedSampler(blocks, processes, rank, seed=0)
batches = iter(DataLoader(blocks, batch_size=8, sampler=sampler))

for step in range(1, args.steps + 1):
    tokens = next(batches).to(device)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # the norm is the worker's
    optimizer.step()
    optimizer.zero_grad()
    if rank == 0 and step % 12 == 0:
        print(f"step {step}: loss {loss.item():.3f} on rank 0, {held:,} parameters here")
slowmo_hf.finish(optimizer)  # the average of all workers

whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if rank == 0:
    model.save_pretrained(args.output_dir, state_dict=whole)
dist.destroy_process_group()
