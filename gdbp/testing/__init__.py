"""Conformance checks that also run on other people's classes."""

from gdbp.testing.optimizer import check_optimizer
from gdbp.testing.report import Check, Report

__all__ = ["Check", "Report", "check_optimizer"]
