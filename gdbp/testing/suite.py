"""A suite of checks, and how one of them is run."""

import copy
import warnings
from collections.abc import Callable

import torch

from gdbp.testing.report import FAIL, NOT_APPLICABLE, PASS, Check, Failure, NotApplicable, one_line


class Suite:
    """Checks by name, of things of one kind.

    Args:
        module: the one that imports all checks and has the suite as ``SUITE``, for another process to find.
        subject: what a check gets, made anew for each from the class and the arguments under test.
    """

    def __init__(self, module: str, subject: Callable):
        self.module, self.subject = module, subject
        # A check returns its evidence, or raises Failure or NotApplicable; any other exception is a failure too.
        self.checks: dict[str, Callable[..., str]] = {}

    def check(self, name: str):
        """Puts a check into the suite; the order of the suite is the order of definition."""

        def add(function):
            self.checks[name] = function
            return function

        return add

    def run(self, name: str, cls: type, arguments: tuple) -> Check:
        """Runs one check in this process and leaves torch's settings as they were."""
        threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        try:
            with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.enable_grad():
                warnings.simplefilter("ignore")
                torch.manual_seed(0)
                subject = self.subject(cls, *copy.deepcopy(arguments))
                evidence = self.checks[name](subject, torch.Generator().manual_seed(0))
            return Check(name, PASS, one_line(evidence))
        except NotApplicable as reason:
            return Check(name, NOT_APPLICABLE, one_line(str(reason)))
        except Failure as failure:
            return Check(name, FAIL, one_line(str(failure)))
        except (Exception, SystemExit) as error:
            return Check(name, FAIL, one_line(f"{type(error).__name__}: {error}"))
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
