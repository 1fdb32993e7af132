"""A first network: handwritten digits (8 x 8 pixels) in a plain training loop. Needs scikit-learn."""

import torch
from sklearn.datasets import load_digits

from gdbp import nn, optim

torch.manual_seed(0)
pixels, digits = load_digits(return_X_y=True)
x = torch.tensor(pixels, dtype=torch.float32) / 8 - 1  # from 0..16 to -1..1
y = torch.tensor(digits)
order = torch.randperm(len(x))
train, test = order[:1437], order[1437:]

model = torch.nn.Sequential(
    nn.Linear(64, 128, activation="relu"),
    nn.Linear(128, 64, activation="relu"),
    nn.Linear(64, 10),
)
nn.init.init_(model, "he", nonlinearity="relu")
loss_fn = nn.CrossEntropyLoss()
optimizer = optim.AdamW(model.parameters(), lr=2e-3)

for epoch in range(1, 21):
    for batch in train[torch.randperm(len(train))].split(32):
        loss = loss_fn(model(x[batch]), y[batch])  # forward: how wrong is the network?
        optimizer.zero_grad()
        loss.backward()  # backpropagation: which way is every weight wrong?
        optimizer.step()  # gradient descent: move every weight a little the other way
    with torch.no_grad():
        accuracy = (model(x[test]).argmax(1) == y[test]).float().mean()
    print(f"epoch {epoch:2}   loss {loss.item():.4f}   test accuracy {accuracy.item():.1%}")
