"""Models to fuse, in the styles in which people write them, and the runs that are in them."""

import torch
import torch.nn.functional as F
from torch import nn

import gdbp


class Attributes(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.bn, self.act = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU()
        self.fc2, self.gelu = nn.Linear(16, 3), nn.GELU()

    def forward(self, x):
        return self.gelu(self.fc2(self.act(self.bn(self.fc1(x)))))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.fc3, self.fc4 = (
            nn.Linear(8, 16),
            nn.Linear(16, 16),
            nn.Linear(16, 16),
            nn.Linear(16, 2),
        )
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, x):
        x = F.gelu(self.fc1(x), approximate="tanh")
        x = torch.tanh(self.fc2(x)) * self.scale + x
        x = F.leaky_relu(self.fc3(x), 0.2)
        return self.fc4(x.relu()).sigmoid()


class Shared(nn.Module):
    """One activation for all layers, and one layer called twice."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(8, 8), nn.Linear(8, 8), nn.SiLU()

    def forward(self, x):
        for _ in range(2):
            x = self.act(self.fc1(x))
        return self.act(self.fc2(x) + x)


class Tower(nn.Module):
    """A list of layers, and a child with a forward of its own."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.norms = nn.ModuleDict({str(i): nn.BatchNorm1d(8) for i in range(2)})
        self.inner = Shared()

    def forward(self, x):
        for i, block in enumerate(self.blocks):
            x = self.norms[str(i)](block(x)).relu() + x
        return self.inner(x)


def nested():
    inner = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Sequential(nn.Linear(8, 8), nn.ELU()))
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.0), inner, nn.BatchNorm1d(8), nn.Softplus())


def tied():
    """A layer at two places, an activation at three, two layers with one weight."""
    layer, act = nn.Linear(8, 8), nn.Tanh()
    model = nn.Sequential(layer, act, layer, act, nn.Linear(8, 8), act)
    model[4].weight = layer.weight
    return model


def without():
    """Without bias, without affine, without running statistics, and ours among torch's."""
    return nn.Sequential(
        nn.Linear(8, 5, bias=False),
        nn.BatchNorm1d(5, affine=False, momentum=None),
        gdbp.nn.Linear(5, 6),
        nn.Sigmoid(),
        nn.Linear(6, 7),
        gdbp.nn.BatchNorm1d(7, track_running_stats=False, activation="relu"),
    )


# builder, shape of the input, and the runs: names of the layers, and what they are computed as
MODELS = {
    "sequential": (
        lambda: nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Linear(16, 4)),
        (7, 8),
        [(("0", "1", "2"), "linear + batch_norm + gelu")],
    ),
    "nested": (
        nested,
        (9, 8),
        [
            (("0", "1"), "linear + relu"),
            (("4", "5"), "batch_norm + softplus"),
            (("3.0", "3.1"), "linear + batch_norm"),
            (("3.2.0", "3.2.1"), "linear + elu"),
        ],
    ),
    "tied": (
        tied,
        (5, 8),
        [(("0", "1"), "linear + tanh"), (("0", "1"), "linear + tanh"), (("4", "1"), "linear + tanh")],
    ),
    "without": (
        without,
        (6, 8),
        [
            (("0", "1"), "linear + batch_norm"),
            (("2", "3"), "linear + sigmoid"),
            (("4", "5"), "linear + batch_norm + relu"),
        ],
    ),
    "mlp": (
        lambda: gdbp.nn.MLP([8, 16, 4], batch_norm=True),
        (6, 8),
        [(("0", "1"), "linear + batch_norm + relu")],
    ),
    "attributes": (
        Attributes,
        (7, 8),
        [(("fc1", "bn", "act"), "linear + batch_norm + relu"), (("fc2", "gelu"), "linear + gelu")],
    ),
    "functional": (
        Functional,
        (7, 8),
        [
            (("fc1", "gelu()"), "linear + gelu_tanh"),
            (("fc2", "tanh()"), "linear + tanh"),
            (("fc4", "sigmoid()"), "linear + sigmoid"),
        ],
    ),
    "shared": (Shared, (4, 8), [(("fc1", "act"), "linear + silu"), (("fc1", "act"), "linear + silu")]),
    "tower": (
        Tower,
        (7, 8),
        [
            (("blocks.0", "norms.0", "relu()"), "linear + batch_norm + relu"),
            (("blocks.1", "norms.1", "relu()"), "linear + batch_norm + relu"),
            (("inner.fc1", "inner.act"), "linear + silu"),
            (("inner.fc1", "inner.act"), "linear + silu"),
        ],
    ),
}


def fused(model, **options):
    """The model, and the report about it."""
    reports = []
    assert gdbp.fuse(model, report=reports.append, **options) is model
    return model, reports[0]


def reasons(report):
    return {left.layer: left.reason for left in report.left}
