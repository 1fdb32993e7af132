"""The same training twice, before and after the swap of one import: torch's AdamW, then gdbp's."""

import torch

import gdbp


def train(AdamW: type[torch.optim.Optimizer]) -> float:
    torch.manual_seed(0)
    x = torch.randn(512, 20)
    y = x[:, :1].sin() + 0.5 * x[:, 1:2]
    model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    optimizer = AdamW(model.parameters(), lr=1e-2, weight_decay=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
    return loss.item()


before = train(torch.optim.AdamW)
after = train(gdbp.optim.AdamW)
print(f"loss after 200 steps: torch.optim.AdamW {before:.6f}, gdbp.optim.AdamW {after:.6f}")
