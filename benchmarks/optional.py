"""Peers that need not be there: how each is imported, and what to install where it is not."""

import importlib
import importlib.metadata
from dataclasses import dataclass
from types import ModuleType


@dataclass(frozen=True)
class Package:
    """What `module` comes from; `device` is the only one it runs on, if any."""

    module: str
    install: str
    device: str | None = None


PEERS = {
    "torchao": Package("torchao.optim", "torchao"),
    "bitsandbytes": Package("bitsandbytes.optim", "bitsandbytes"),
    "deepspeed": Package("deepspeed.ops.adam", "deepspeed", "cpu"),
    "jax": Package("optax", "jax optax"),
    "liger": Package("liger_kernel.transformers", "liger-kernel", "cuda"),
}


def load(peer: str, device: str) -> tuple[ModuleType | None, str]:
    """The module, or None and what the user can do about it."""
    package = PEERS[peer]
    if package.device not in (None, device):
        return None, f"runs on {package.device} only"
    try:
        return importlib.import_module(package.module), ""
    except ImportError as error:
        missing = (error.name or "").split(".")[0]
        if missing in ("", package.module.split(".")[0]) or missing in package.install.split():
            return None, f"pip install {package.install}"
        return None, reason(error)
    except Exception as error:  # some fail in their own ways, where a GPU or a compiler is missing
        return None, reason(error)


def reason(error: Exception) -> str:
    """The first line of an error, short enough for a table."""
    line = next(iter(str(error).strip().splitlines()), "")
    line = f"{type(error).__name__}: {line}".rstrip(": ")
    return line if len(line) <= 80 else line[:77] + "..."


def versions() -> dict[str, str]:
    """Of those that are installed, by the name of the distribution."""
    found = {}
    for name in sorted({name for package in PEERS.values() for name in package.install.split()}):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
