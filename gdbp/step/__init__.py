"""The whole training step in one call."""

from gdbp.step.train_step import TrainStep

__all__ = ["TrainStep"]
