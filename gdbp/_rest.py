"""What torch's module has and ours of the same name has not: a script that changes an import finds it there, too."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def rest_of(module: str, torchs: ModuleType) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of ``module``, a name, which also know the public names of ``torchs``."""

    def __getattr__(name: str) -> Any:
        if not name.startswith("_") and hasattr(torchs, name):
            return getattr(torchs, name)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        own = vars(sys.modules[module])
        return sorted({*own, *(name for name in dir(torchs) if not name.startswith("_"))})

    return __getattr__, __dir__
