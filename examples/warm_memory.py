"""Plain PyTorch on the CPU, with memory that stays warm: `python examples/warm_memory.py`, and again with `--cold`."""

import argparse
import statistics
import time

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gdbp

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--cold", action="store_true", help="without the cache")
parser.add_argument("--batch", type=int, default=128)
parser.add_argument("--width", type=int, default=512, help="of the two hidden layers")
parser.add_argument("--classes", type=int, default=10)
parser.add_argument("--steps", type=int, default=200)
options = parser.parse_args()
for name, value in vars(options).items():
    if name != "cold" and value < 1:
        parser.error(f"--{name} is {value}; expected at least 1")

if not options.cold:
    gdbp.memory.enable_cpu_cache()

torch.manual_seed(0)
images = torch.randn(8 * options.batch, 784)
labels = images[:, : options.classes].argmax(1)
batches = DataLoader(TensorDataset(images, labels), options.batch, shuffle=True)
model = nn.Sequential(
    nn.Linear(784, options.width), nn.ReLU(), nn.Linear(options.width, options.width), nn.ReLU(),
    nn.Linear(options.width, options.classes),
)  # fmt: skip
optimizer = torch.optim.Adam(model.parameters())
loss = nn.CrossEntropyLoss()
seconds = []
while len(seconds) < options.steps:
    for x, y in batches:
        start = time.perf_counter()
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
memory = gdbp.memory.cpu_memory_stats()
print(f"loss {value.item():.4f}; {memory.get('reserved_bytes.all.current', 0) / 2**20:.0f} MiB in the cache's hands")
print(f"{statistics.median(seconds) * 1e3:.3f} ms a step")
