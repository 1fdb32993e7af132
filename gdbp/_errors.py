"""The one error that somebody at the command line should meet, and the check for optional packages."""

import importlib

__all__ = ["InputError", "require"]


class InputError(ValueError):
    """What was given can't be used; the message is one sentence that says which part, and what to do."""


def require(*modules: str) -> None:
    """Raises InputError naming the missing packages, before time is spent on work that needs them."""
    missing = [name for name in modules if not _importable(name)]
    if missing:
        packages = ", ".join({"sklearn": "scikit-learn"}.get(name, name) for name in missing)
        raise InputError(f"this needs {packages}, not installed here: pip install 'gdbp[train]'")


def _importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True
