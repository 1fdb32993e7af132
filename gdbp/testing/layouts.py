"""Layouts of tensors in memory: strides, and guards around a tensor."""

import torch

_GUARD = 4096  # elements before and after; more than any parameter here has, so that a wrong kernel stays inside
_MARK = 12345.0


class Guarded:
    """A tensor of any strides inside a larger buffer of marks."""

    def __init__(self, values: torch.Tensor, strides: tuple[int, ...], offset: int = 0):
        extent = sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True)) + 1
        self._buffer = torch.full((2 * _GUARD + offset + extent,), _MARK, dtype=values.dtype)
        self._layout = (values.shape, strides, _GUARD + offset)
        self.view = self._buffer.as_strided(*self._layout)
        if any(strides):
            self.view.copy_(values)
        else:  # an expanded tensor holds one number, and torch refuses to copy into it
            self._buffer[_GUARD + offset] = values.view(-1)[0]

    def overwritten(self) -> int:
        """How many elements around the tensor were written."""
        outside = torch.ones(self._buffer.shape, dtype=torch.bool)
        outside.as_strided(*self._layout).fill_(False)
        return int((self._buffer[outside] != _MARK).sum())


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def transposed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return contiguous(shape[::-1])[::-1]


def channels_last(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").to(memory_format=torch.channels_last).stride()


def every_second(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(2 * s for s in contiguous(shape))


def expanded(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (0,) * len(shape)
