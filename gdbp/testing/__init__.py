"""Conformance checks that also run on other people's classes."""

from gdbp.testing.layers import check_layer
from gdbp.testing.optimizers import check_optimizer
from gdbp.testing.report import Check, Report

__all__ = ["Check", "Report", "check_layer", "check_optimizer"]
