"""Hidden states between two layers, of all samples: in memory, or in a file where they take too much of it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


class HiddenStates:
    """[N, C]: the tokens of all samples, read and replaced some at a time. A file is read and written, never mapped."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, file: Path | None) -> None:
        """`file` None keeps them in memory; otherwise it is made anew."""
        self.shape, self.dtype = shape, dtype
        self._token_bytes = shape[1] * dtype.itemsize
        self._file = None if file is None else file.open("w+b")
        self._kept = torch.empty(shape, dtype=dtype) if file is None else None

    def read(self, start: int, stop: int) -> Tensor:
        """Tokens start to stop, [stop - start, C], in memory of their own or as a view."""
        if self._kept is not None:
            return self._kept[start:stop]
        assert self._file is not None
        data = torch.empty((stop - start) * self._token_bytes, dtype=torch.uint8)
        self._file.seek(start * self._token_bytes)
        filled = self._file.readinto(data.numpy().data)
        assert filled == len(data), "hidden states are read before they are written"
        return data.view(self.dtype).view(stop - start, self.shape[1])

    def write(self, start: int, x_NC: Tensor) -> None:
        """Replace the tokens from `start` on."""
        if self._kept is not None:
            self._kept[start : start + len(x_NC)] = x_NC
            return
        assert self._file is not None
        self._file.seek(start * self._token_bytes)
        self._file.write(x_NC.to(self.dtype).contiguous().view(torch.uint8).numpy().data)

    def close(self) -> None:
        """Give memory or file free; a file is removed by whoever made its folder."""
        self._kept = None
        if self._file is not None:
            self._file.close()
