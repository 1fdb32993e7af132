"""Optimizers with torch.optim's interfaces: every step one pass over memory, in one call."""

from gdbp.optim.adam import Adam, AdamW
from gdbp.optim.rmsprop import RMSprop
from gdbp.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "RMSprop"]
