"""What ``isinstance`` says of torch's layers and losses where a script asks for ours."""

import abc
from typing import Any


class Twin(abc.ABCMeta):
    """Of classes that stand for one of torch's, ``_torchs``: what is that is this, too.

    Whoever changed an import asks for ``gdbp.nn.Linear`` where it was ``torch.nn.Linear``, to draw initial weights or
    to sort parameters by their decay, and torch's modules (attention, transformers, lazy layers) are made of torch's.
    An ``ABCMeta``, since that is what a subclass may be as well.
    """

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, vars(cls).get("_torchs", ())) or super().__instancecheck__(instance)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, vars(cls).get("_torchs", ())) or super().__subclasscheck__(subclass)
