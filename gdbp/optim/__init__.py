"""Optimizers with torch.optim's interfaces: every step one pass over memory, in one call. The rest of it is torch's
own: ``gdbp.optim.X`` is ``torch.optim.X`` where there is none of ours."""

import torch

from gdbp._rest import rest_of
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

__getattr__, __dir__ = rest_of(__name__, torch.optim)
