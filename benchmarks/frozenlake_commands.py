"""The project's own commands as child processes of a benchmark: logged, one thread each, none left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


class RunFailed(Exception):
    """A command ended with an error; the message names its log."""


class Commands:
    """Starts commands from several threads; `stop` ends them all, and no more are started."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen] = set()
        self._stopped = False

    def call(self, log: Path, script: str, *arguments: object) -> None:
        """Run `python SCRIPT ARGUMENTS` in the repository to its end; its output is appended to `log`.

        Raises RunFailed when it ends with another exit code than 0, or after `stop`.
        """
        command = [sys.executable, script, *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            file.write(f"\n$ {' '.join(command)}\n")
            file.flush()
            with self._lock:
                if self._stopped:
                    raise RunFailed(f"stopped before {script}")
                child = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=file, stderr=file)
                self._running.add(child)
            code = child.wait()
        with self._lock:
            self._running.discard(child)
        if code != 0:
            last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1]
            raise RunFailed(f"{script} ended with exit code {code}: {last} (all of it: {log})")

    def stop(self) -> None:
        """Ask every running command to end (training writes a checkpoint first)."""
        with self._lock:
            self._stopped = True
            for child in self._running:
                child.terminate()
