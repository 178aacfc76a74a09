"""Stopping in good order: SIGTERM, SIGINT and SIGUSR1 ask the run to write a checkpoint and end.

SLURM sends SIGUSR1 (see launch/slurm/train.sbatch) ahead of a preemption or the time limit; a person
types Ctrl-C. The handler only sets a flag; the ranks agree on it after every step, since a signal may
reach one rank a step before another.
"""

from __future__ import annotations

import signal
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Context manager; `.asked` turns True on the first signal, a second one kills the process as usual."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def __exit__(self, *exc: object) -> None:
        self._restore()
