"""Optimizers with torch.optim's interfaces: every step one pass over memory, in one call."""

from gdbp.optim.adagrad import Adadelta, Adagrad
from gdbp.optim.adam import Adam, Adamax, AdamW, NAdam, RAdam
from gdbp.optim.lion import Lion
from gdbp.optim.rmsprop import RMSprop
from gdbp.optim.sgd import SGD

__all__ = [
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Lion",
    "NAdam",
    "RAdam",
    "RMSprop",
]
