"""
What `.ci/wheel` runs with two processes where the wheel is installed: one round of Local SGD on other data each, held
to the average by hand, and the names that transformers comes with.
"""

import importlib.metadata
import sys
import warnings
from pathlib import Path

import torch
from accelerate import Accelerator

import slowmo_hf

warnings.simplefilter("ignore")
accelerator = Accelerator(cpu=True)
model = torch.nn.Linear(1, 1, bias=False)
torch.nn.init.constant_(model.weight, 8.0)
config = slowmo_hf.SlowMoConfig(sync_every=2, outer_momentum=0.0)
optimizer = slowmo_hf.SlowMoOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), config)
model, optimizer = accelerator.prepare(model, optimizer)
assert "transformers" not in sys.modules, "custom loops need no Trainer"
for _ in range(2):
    x = torch.tensor([[1.0 + 2 * accelerator.process_index]])  # the gradient too: 1 on worker 0, 3 on worker 1
    accelerator.backward(model(x).sum())
    optimizer.step()
    optimizer.zero_grad()
slowmo_hf.finish(optimizer)
weight = next(model.parameters()).item()
assert weight == 4.0, weight  # 8 - 2·1 = 6 and 8 - 2·3 = 2, on average 4
assert slowmo_hf.__version__ == importlib.metadata.version("slowmo-hf")
assert "site-packages" in Path(slowmo_hf.__file__).parts, slowmo_hf.__file__
assert slowmo_hf.SlowMoCallback.__name__ == "SlowMoCallback"
accelerator.print(f"slowmo-hf {slowmo_hf.__version__} trains outside the checkout")
accelerator.end_training()
