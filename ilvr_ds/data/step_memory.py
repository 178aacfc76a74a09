"""Memory for the pixels of one step after the other, used again as soon as nobody looks at it.

A step's pixels are tens of megabytes. New memory of that size has to be cleared by the system, page by page: for shared
memory, which is what a decoding worker sends, that takes a third as long as decoding photographs. So a worker keeps a
few pieces. Whether one is free is told by its last byte: taking a piece sets it, and it is cleared when the last tensor
that looks into the piece is gone, in whichever process that is. Who keeps batches gets new memory for the next ones.
"""

from __future__ import annotations

import weakref

import numpy as np
import torch

_TAKEN, _FREE = 1, 0
_GRAIN = 1 << 20  # bytes; sizes differ from step to step, pieces are made a little larger


class StepMemory:
    """Hands out pieces of memory.

    Args:
        keep: pieces remembered, at most: as many as are in use at once.
        shared: in shared memory, for a process that sends them: `received` is to be called where they arrive.
    """

    def __init__(self, keep: int, *, shared: bool):
        self._keep, self._shared = keep, shared
        self._pieces: list[torch.Tensor] = []  # the one taken last comes last

    def take(self, size: int) -> torch.Tensor:
        """(size or more,) uint8, not cleared."""
        free = [piece for piece in self._pieces if piece[-1] == _FREE]
        piece = next((piece for piece in free if len(piece) > size), None)
        if piece is None:
            piece = _allocate(-(-(size + 1) // _GRAIN) * _GRAIN, self._shared)
            full = len(self._pieces) >= self._keep
            forgotten = free[0] if free else self._pieces[0] if full else None  # too small, or never given back
        else:
            forgotten = piece
        self._pieces = [*(p for p in self._pieces if p is not forgotten), piece]
        piece[-1] = _TAKEN
        return piece if self._shared else received(piece)


def received(piece: torch.Tensor) -> torch.Tensor:
    """The same memory, free again when this tensor and all its views are gone."""
    whole = piece.numpy()
    lent = whole[:]  # an object of its own: what the storage of the new tensor keeps alive
    weakref.finalize(lent, _give_back, whole).atexit = False
    return torch.from_numpy(lent)


def _give_back(whole: np.ndarray) -> None:
    whole[-1] = _FREE


def _allocate(size: int, shared: bool) -> torch.Tensor:
    if not shared:
        return torch.from_numpy(np.empty(size, np.uint8))
    # As torch's own collation does it: made in shared memory. `share_memory_()` would copy it there.
    return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size))
