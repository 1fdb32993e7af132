"""How parameters and states are stored: master weights, the states' dtype, moving averages."""

from typing import Any, NamedTuple

import torch

# A state smaller than this is kept in float32: its scales and its share of the error would not be worth it.
MIN_8BIT_SIZE = 4096
# kQuantBlock and kLeastScale in csrc/optim/blockwise8.h
BLOCK, LEAST_SCALE = 128, 2.0**-105
_HALF = (torch.bfloat16, torch.float16)


class Precision(NamedTuple):
    """The options of an optimizer that say what is stored and how; see :class:`gdbp.optim._base.Fused`."""

    master_weights: bool = False
    stochastic_rounding: bool | int = False
    state_dtype: torch.dtype | str | None = None
    ema_decay: float | None = None
    copy_dtype: torch.dtype | None = None

    def check(self) -> None:
        dtypes = (None, "8bit", torch.float64, torch.float32, *_HALF)
        if self.state_dtype not in dtypes:
            raise ValueError(
                f"Invalid state_dtype: {self.state_dtype!r}; expected None (the parameter's), '8bit', or a floating "
                "dtype"
            )
        try:
            is_decay = self.ema_decay is None or 0.0 <= self.ema_decay < 1.0
        except TypeError:
            is_decay = False
        if not is_decay:
            raise ValueError(
                f"Invalid ema_decay: {self.ema_decay!r}; expected a number from 0 to 1, or None for no average"
            )
        if self.copy_dtype not in (None, torch.float64, torch.float32, *_HALF):
            raise ValueError(f"Invalid copy_dtype: {self.copy_dtype!r}; expected a floating dtype, or None for no copy")
        if self.copy_dtype is not None and self.master_weights:
            raise ValueError(
                f"Invalid copy_dtype: {self.copy_dtype} with master_weights, where the parameter itself is the copy; "
                "expected one of the two"
            )
        if self.stochastic_rounding < 0:
            raise ValueError(f"Invalid stochastic_rounding: {self.stochastic_rounding}; expected a bool or a seed > 0")

    def is_default(self) -> bool:
        return self == Precision()

    @property
    def seed(self) -> int:
        return int(self.stochastic_rounding)

    @property
    def average_weight(self) -> float:
        return 0.0 if self.ema_decay is None else 1.0 - self.ema_decay

    @property
    def _chooses_dtype(self) -> bool:
        return self.master_weights or self.state_dtype is not None

    def roles(self, states: tuple[str, ...]) -> list[tuple[str, str]]:
        """What a parameter keeps besides its counts, as pairs of role and key (see csrc/step/plan.h)."""
        roles = [("state", key) for key in states]
        roles += [("scale", key + "_scale") for key in states]
        if self.master_weights:
            roles.append(("master", "master_param"))
        if self.ema_decay is not None:
            roles.append(("average", "ema_param"))
        if self.copy_dtype is not None:
            roles.append(("copy", "param_copy"))
        return roles

    def is_prepared(self, p: torch.Tensor, state: dict[str, Any], keys: tuple[str, ...]) -> bool:
        """Whether :meth:`prepare` would find nothing to do."""
        wanted = [name for name, is_wanted in (("master_param", self._has_master(p)), *self._besides()) if is_wanted]
        return all(state.get(key) is not None for key in (*keys, *wanted)) and all(
            state[key].dtype is self._stored(p) for key in keys if self._chooses_dtype
        )

    def prepare(self, p: torch.Tensor, state: dict[str, Any], keys: tuple[str, ...], initial: float = 0.0) -> bool:
        """Creates what is missing in a parameter's state, in the dtypes wanted. True where a state was new.

        initial: what its elements start at.
        """
        if p.is_complex() and (self._chooses_dtype or self.copy_dtype is not None):
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} is {p.dtype}, and states and copies of a dtype of their own "
                "are for real ones; switch off master_weights, state_dtype and copy_dtype"
            )
        fresh = False
        for key in keys:
            if state.get(key) is None:
                value = complex(initial, initial) if p.is_complex() else initial
                state[key] = torch.full_like(p, value, dtype=self._dtype(p), memory_format=torch.preserve_format)
                fresh = True
            elif self._chooses_dtype and state[key].dtype is not self._stored(p):
                # From a checkpoint of another choice, or torch's Adagrad, which creates its own.
                scale = state.pop(f"{key}_scale", None) if state[key].dtype is torch.int8 else None
                wide = state[key] if scale is None else decode(state[key], scale)
                state[key] = wide.to(self._dtype(p))
            if self._stored(p) is torch.int8 and state[key].dtype is not torch.int8:
                state[key], state[key + "_scale"] = encode(state[key])
        if self._has_master(p) and state.get("master_param") is None:
            state["master_param"] = p.detach().to(torch.float32, memory_format=torch.preserve_format)
        if self.ema_decay is not None and state.get("ema_param") is None:
            dtype = torch.float32 if p.dtype in _HALF else p.dtype
            state["ema_param"] = p.detach().to(dtype, memory_format=torch.preserve_format, copy=True)
        if self.copy_dtype is not None and state.get("param_copy") is None:
            state["param_copy"] = p.detach().to(self.copy_dtype, memory_format=torch.preserve_format, copy=True)
        return fresh

    def _has_master(self, p: torch.Tensor) -> bool:
        return self.master_weights and p.dtype in _HALF

    def _besides(self) -> tuple[tuple[str, bool], ...]:
        return ("ema_param", self.ema_decay is not None), ("param_copy", self.copy_dtype is not None)

    def _stored(self, p: torch.Tensor) -> torch.dtype:
        """What a state is kept in: int8 where it is in blocks with scales."""
        return torch.int8 if self.state_dtype == "8bit" and p.numel() >= MIN_8BIT_SIZE else self._dtype(p)

    def _dtype(self, p: torch.Tensor) -> torch.dtype:
        if self.state_dtype == "8bit":
            return torch.float32
        if self.state_dtype is None:
            return torch.float32 if self.master_weights and p.dtype in _HALF else p.dtype
        return self.state_dtype


def encode(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor as codes of 8 bits, in its own layout, and a float32 scale for each 128 of them in memory order;
    csrc/optim/blockwise8.h says what a code stands for."""
    flat = torch.as_strided(x, (x.numel(),), (1,)).float() if x.numel() else x.reshape(-1).float()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1)
    scale = torch.where(scale > 0, scale.clamp_min(LEAST_SCALE), scale)
    share = (blocks / torch.where(scale > 0, scale, 1.0)[:, None]).abs()
    code = (127 * share.pow(1 / 3)).round().clamp(1, 127) * blocks.sign()
    codes = torch.empty_like(x, dtype=torch.int8, memory_format=torch.preserve_format)
    torch.as_strided(codes, (x.numel(),), (1,)).copy_(code.view(-1)[: x.numel()])
    return codes, scale


def decode(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The float32 tensor that codes and scales stand for."""
    x = torch.empty_like(codes, dtype=torch.float32, memory_format=torch.preserve_format)
    flat = torch.as_strided(codes, (codes.numel(),), (1,)).float() / 127
    factors = scale.repeat_interleave(BLOCK)[: codes.numel()]
    torch.as_strided(x, (codes.numel(),), (1,)).copy_(factors * flat**3)
    return x
