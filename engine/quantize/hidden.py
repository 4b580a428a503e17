"""Hidden states between two layers, of all samples: in memory, or in a file where they take too much of it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


class HiddenStates:
    """[S, T, C]: read and replaced a few samples at a time. A file is read and written, never mapped."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, file: Path | None) -> None:
        """`file` None keeps them in memory; otherwise it is made anew."""
        self.shape, self.dtype = shape, dtype
        self._sample_bytes = shape[1] * shape[2] * dtype.itemsize
        self._file = None if file is None else file.open("w+b")
        self._kept = torch.empty(shape, dtype=dtype) if file is None else None

    @property
    def num_bytes(self) -> int:
        return self.shape[0] * self._sample_bytes

    def read(self, start: int, stop: int) -> Tensor:
        """Samples start to stop, [B, T, C], in memory of their own or as a view."""
        if self._kept is not None:
            return self._kept[start:stop]
        assert self._file is not None
        data = torch.empty((stop - start) * self._sample_bytes, dtype=torch.uint8)
        self._file.seek(start * self._sample_bytes)
        filled = self._file.readinto(data.numpy().data)
        assert filled == len(data), "hidden states are read before they are written"
        return data.view(self.dtype).view(stop - start, *self.shape[1:])

    def write(self, start: int, x_BTC: Tensor) -> None:
        """Replace the samples from `start` on."""
        if self._kept is not None:
            self._kept[start : start + len(x_BTC)] = x_BTC
            return
        assert self._file is not None
        self._file.seek(start * self._sample_bytes)
        self._file.write(x_BTC.to(self.dtype).contiguous().view(torch.uint8).numpy().data)

    def close(self) -> None:
        """Give memory or file free; a file is removed by whoever made its folder."""
        self._kept = None
        if self._file is not None:
            self._file.close()
