"""Worker processes that may die at any moment without harm.

A worker that is gone is replaced and its task done again from its start; which record it was at is known from memory
it shares with its parent. What the end means depends on how it came:

- the worker crashed (SIGSEGV, SIGBUS, SIGABRT, ...): once may be chance; twice at the same record is the record's
  doing. It is rejected as `worker_died` and the build goes on: the same way, with the same bytes, every time.
- the worker was killed (SIGKILL, SIGTERM, ...): by a person or for want of memory, which another machine would have.
  The record is never rejected for it; a record at which it happens three times ends the build by name.
- the worker ended by itself: a bug, whose traceback it has printed. The build ends.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from ilvr_ds.data.build_worker import Task, Watch, Work, perform
from ilvr_ds.errors import IlvrError, ShardError

CRASHES = {-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT, -signal.SIGFPE, -signal.SIGILL, -signal.SIGSYS}
CRASHES_ALLOWED = 2  # at one record, after which it is rejected
KILLS_ALLOWED = 3  # at one record, or in a row without any result: after that the build ends
FORK_SERVER_GONE = 255  # what multiprocessing reports when the server was killed and can say nothing of the worker
TICK_S = 0.2  # how often the caller hears of progress
FORK_SERVER_S = 20.0  # how long a new fork server is tried for


@dataclass(frozen=True)
class Failed:
    """A worker's task ended with an error of the user's making."""

    message: str


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    numbers: Any  # shared int64[3]: see `Watch`
    task: Task | None = None
    rejects: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # of its task so far


class WorkerPool:
    """`with WorkerPool(work, 4) as pool: for task, result in pool.run(tasks): ...`

    `on_tick` is called a few times a second, from the caller's thread; `live` then says what the workers have done of
    the tasks they are at. Leaving the block ends the workers at once, whatever they are doing.
    """

    def __init__(self, work: Work, workers: int, on_tick: Callable[[WorkerPool], None]):
        # Not fork: a forked copy of a threaded program can hang. The fork server has the libraries loaded already.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["ilvr_ds.data.build_pool"])
        self._work, self._on_tick, self._count = work, on_tick, workers
        self._workers: list[_Worker] = []
        self._crashes: Counter[int] = Counter()  # by place of the record
        self._kills: Counter[int] = Counter()
        self._kills_in_a_row = 0

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()
        self._workers.clear()

    def live(self) -> tuple[int, int, list[tuple[str, str]]]:
        """(records, bytes, rejects as (reason, message)) of the tasks that are being done."""
        busy = [worker for worker in self._workers if worker.task is not None]
        rejects = [reject for worker in busy for reject in worker.rejects]
        return sum(w.numbers[1] for w in busy), sum(w.numbers[2] for w in busy), rejects

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, bytes | Any]]:
        """Do the tasks; (task, result) in the order in which they get done.

        Raises ShardError when a task fails, or when workers keep being killed; RuntimeError when a worker had a bug.
        """
        waiting = iter(tasks)
        again: list[Task] = []
        while True:
            idle = [worker for worker in self._workers if worker.task is None]
            while idle or len(self._workers) < self._count:
                task = again.pop() if again else next(waiting, None)
                if task is None:
                    break
                self._hand_out(idle.pop() if idle else self._start(), task)
            if all(worker.task is None for worker in self._workers):
                return
            handles = {worker.connection: worker for worker in self._workers}
            handles |= {worker.process.sentinel: worker for worker in self._workers}
            ready = {id(w): w for w in (handles[handle] for handle in wait(list(handles), TICK_S))}
            for worker in ready.values():
                yield from self._messages(worker)
                if not worker.process.is_alive():
                    yield from self._messages(worker)  # what it sent before its end
                    self._workers.remove(worker)
                    task = self._buried(worker)
                    again += [] if task is None else [task]
            self._on_tick(self)

    def _start(self) -> _Worker:
        give_up = time.monotonic() + FORK_SERVER_S
        while time.monotonic() < give_up:
            ours, theirs = self._context.Pipe()
            numbers = self._context.RawArray("q", 3)
            process = self._context.Process(target=_serve, args=(self._work, theirs, numbers), daemon=True)
            try:
                process.start()
            except (EOFError, ConnectionError):  # the fork server was killed at this moment
                ours.close()
                time.sleep(TICK_S)  # until it is gone: a start then makes a new one; killed is not yet gone
            else:
                self._workers.append(_Worker(process, ours, numbers))
                return self._workers[-1]
            finally:
                theirs.close()
        raise ShardError(
            f"the fork server of the build workers was killed, and no other could be started in {FORK_SERVER_S:.0f} s; "
            f"is the memory short? Run the same command again: what is finished is kept"
        )

    @staticmethod
    def _hand_out(worker: _Worker, task: Task) -> None:
        worker.task = task
        worker.rejects.clear()
        worker.numbers[:] = [task.start, 0, 0]
        try:
            worker.connection.send(task)
        except OSError:
            worker.process.join()  # it is gone; found so by its sentinel, the task is then done again

    def _messages(self, worker: _Worker) -> Iterator[tuple[Task, Any]]:
        """Take what the worker sent; yields its result if it has one."""
        try:
            while worker.connection.poll():
                message = worker.connection.recv()
                if isinstance(message, tuple):
                    worker.rejects.append(message)
                elif isinstance(message, Failed):
                    raise ShardError(message.message)
                else:
                    task, worker.task = worker.task, None
                    self._kills_in_a_row = 0
                    yield task, message
        except (EOFError, OSError):
            worker.process.join()  # its end of the pipe is closed, maybe in the middle of a message: it is gone

    def _buried(self, worker: _Worker) -> Task | None:
        """Judge the end of a worker; returns the task to be done again, if it was at one."""
        code, task = worker.process.exitcode, worker.task
        worker.connection.close()
        place = int(worker.numbers[0])
        at = "" if task is None else f" at record {place + 1}, {self._work.source.origin(place)}"
        if code != FORK_SERVER_GONE and (code is None or code >= 0):
            raise RuntimeError(f"a build worker ended with exit code {code}{at}: a bug; its traceback is above")
        name = "its fork server ended" if code == FORK_SERVER_GONE else signal.Signals(-code).name
        if task is None:
            return None
        if code in CRASHES:
            self._crashes[place] += 1
            if self._crashes[place] >= CRASHES_ALLOWED:
                return dataclasses.replace(task, crashed={**task.crashed, place: name})
            return task
        self._kills[place] += 1
        self._kills_in_a_row += 1
        if self._kills[place] >= KILLS_ALLOWED or self._kills_in_a_row >= KILLS_ALLOWED * self._count:
            raise ShardError(
                f"build workers are killed again and again ({name}), last{at}: is the memory short? Give fewer "
                f"--workers, or leave that record out; run the same command again: what is finished is kept"
            )
        return task


class InProcess:
    """The same without processes, for a debugger: a record that crashes the image library crashes the build."""

    def __init__(self, work: Work, on_tick: Callable[[InProcess], None]):
        self._work, self._on_tick = work, on_tick
        self._numbers, self._rejects = [0, 0, 0], []

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to end."""

    def live(self) -> tuple[int, int, list[tuple[str, str]]]:
        """As `WorkerPool.live`."""
        return self._numbers[1], self._numbers[2], self._rejects

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, bytes | Any]]:
        """As `WorkerPool.run`, in order."""
        watch = Watch(self._numbers, lambda *reject: self._rejects.append(reject), lambda: self._on_tick(self))
        for task in tasks:
            result = perform(self._work, task, watch)
            self._numbers[:] = [0, 0, 0]
            self._rejects.clear()
            yield task, result


def _serve(work: Work, connection: Connection, numbers: Any) -> None:
    """A worker's life: a task, its result, the next."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
    threading.Thread(target=_end_with_parent, daemon=True).start()
    watch = Watch(numbers, lambda reason, message: connection.send((reason, message)))
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            result = perform(work, task, watch)
        except IlvrError as error:
            result = Failed(str(error))
        connection.send(result)


def _end_with_parent() -> None:
    """A killed parent takes its workers along: none goes on writing into a folder that another build has taken up."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
