"""Workers that die, disks that are full: a clear end, or none at all, and nothing half-written."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from data_tools.build_shards import main
from ilvr_ds.data import build_pool
from ilvr_ds.data.build import BuildSettings, build
from ilvr_ds.data.build_pool import WorkerPool
from ilvr_ds.data.build_settings import prepare_folder
from ilvr_ds.data.build_worker import Task, Work, finished_shard
from ilvr_ds.data.formats.source import open_source
from ilvr_ds.data.whole_file import whole_file
from ilvr_ds.errors import ShardError

REPOSITORY = Path(__file__).resolve().parents[3]

# A module of its own, for worker processes to import: the real source, with a record that ends its reader.
DEADLY_SOURCE = """
import os
from pathlib import Path

class DeadlySource:
    def __init__(self, source, place, signals, log):
        self.source, self.place, self.signals, self.log = source, place, signals, Path(log)
        self.sha256 = source.sha256

    def __len__(self):
        return len(self.source)

    def read(self, start, stop):
        for place, item in zip(range(start, stop), self.source.read(start, stop), strict=True):
            if place == self.place:
                with self.log.open("a") as log:
                    log.write("x")
                tried = len(self.log.read_text())
                if tried <= len(self.signals):
                    if self.signals[tried - 1] == 0:
                        raise ZeroDivisionError("a bug")
                    os.kill(os.getpid(), self.signals[tried - 1])
            yield item

    def ids(self, start, stop):
        return self.source.ids(start, stop)

    def origin(self, place):
        return self.source.origin(place)
"""


def files(folder) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file()}


@dataclass
class Trial:
    work: Work
    log: Path
    calm: Path  # the same build, undisturbed

    def run(self) -> list:
        """Records 0-2 and 3-5 as two shards by two workers; the summaries by number."""
        with WorkerPool(self.work, 2, lambda pool: None) as pool:
            done = [summary for _, summary in pool.run([Task(0, 3, 0), Task(3, 6, 1)])]
        return sorted(done, key=lambda summary: summary.number)

    @property
    def tries(self) -> int:
        return len(self.log.read_text())


@pytest.fixture
def trial(write_records, good_record, tokenizer, tmp_path, monkeypatch):
    """`trial(signals)`: reading record 4 (the second of shard 1) ends the worker by each of the signals in turn."""
    source = write_records([good_record(f"r{i}") for i in range(6)])
    (tmp_path / "deadly_source.py").write_text(DEADLY_SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    settings = BuildSettings((source,), "ilvr", tmp_path, tmp_path / "calm", samples_per_shard=3)
    build(settings, tokenizer, lambda progress: None)

    def make(*signals: int) -> Trial:
        from deadly_source import DeadlySource

        settings = BuildSettings((source,), "ilvr", tmp_path, tmp_path / "out", samples_per_shard=3)
        prepare_folder(settings.out)
        real = open_source(source, "ilvr", tmp_path / "out" / "progress")
        deadly = DeadlySource(real, 4, signals, tmp_path / "log")
        return Trial(Work(settings, deadly, tokenizer), tmp_path / "log", tmp_path / "calm")

    yield make
    sys.modules.pop("deadly_source", None)


@pytest.mark.parametrize("ends", [(signal.SIGKILL,) * 2, (signal.SIGTERM, signal.SIGSEGV, signal.SIGKILL)])
def test_a_worker_that_dies_by_chance_costs_nothing(trial, ends):
    """Kills are never the record's fault, and one crash may be chance: the record is built."""
    case = trial(*ends)
    summaries = case.run()
    assert case.tries == len(ends) + 1
    assert [summary.samples for summary in summaries] == [3, 3]
    for name, digest in files(case.work.settings.out).items():
        if name.endswith(".tar"):
            assert digest == files(case.calm)[name]


def test_a_record_that_crashes_its_worker_twice_is_rejected(trial):
    case = trial(signal.SIGSEGV, signal.SIGABRT)
    assert [summary.samples for summary in case.run()] == [3, 2]
    assert case.tries == 2  # not read a third time
    (reject,) = finished_shard(case.work.settings.out, 1).rejects
    assert reject["reason"] == "worker_died" and reject["origin"] == f"{case.work.settings.inputs[0]}:5"
    assert "SIGABRT" in reject["message"]
    assert finished_shard(case.work.settings.out, 0).rejects == []


def test_killed_again_and_again_is_an_error_that_names_the_record(trial):
    case = trial(*[signal.SIGKILL] * 9)
    with pytest.raises(ShardError, match=r"SIGKILL.*at record 5, .*records\.jsonl:5:.*--workers"):
        case.run()
    assert case.tries == 3
    assert (
        finished_shard(case.work.settings.out, 1) is None and not (case.work.settings.out / "shard-000001.tar").exists()
    )


def test_a_bug_in_a_worker_ends_the_build(trial):
    case = trial(0)
    with pytest.raises(RuntimeError, match="exit code 1 at record 5"):
        case.run()
    assert case.tries == 1


def test_no_worker_is_left_behind(trial):
    case = trial(signal.SIGKILL)
    before = {p.pid for child in psutil.Process().children() for p in child.children()}
    case.run()
    assert {p.pid for child in psutil.Process().children() for p in child.children()} <= before


class DyingServer:
    """A context of multiprocessing whose fork server has been killed but is not gone yet: the first starts fail."""

    def __init__(self, context, failures: int):
        self.context, self.failures = context, failures

    def Process(self, **options):
        process = self.context.Process(**options)
        if self.failures > 0:
            self.failures -= 1
            process.start = self._refuse
        return process

    @staticmethod
    def _refuse():
        raise ConnectionRefusedError

    def __getattr__(self, name):
        return getattr(self.context, name)


@pytest.mark.parametrize("failures", [4, 10**9])
def test_a_fork_server_that_takes_its_time_to_die(trial, monkeypatch, failures):
    monkeypatch.setattr(build_pool, "TICK_S", 0.01)
    monkeypatch.setattr(build_pool, "FORK_SERVER_S", 20.0 if failures == 4 else 0.1)
    case = trial()
    with WorkerPool(case.work, 2, lambda pool: None) as pool:
        pool._context = DyingServer(pool._context, failures)
        if failures == 4:
            assert len(list(pool.run([Task(0, 3, 0), Task(3, 6, 1)]))) == 2
        else:
            with pytest.raises(ShardError, match="fork server"):
                list(pool.run([Task(0, 3, 0)]))


@pytest.fixture
def command(tokenizer_folder):
    """The arguments of a build_shards command."""

    def make(source, out, workers: int) -> list[str]:
        options = ["--input", source, "--tokenizer", tokenizer_folder, "--out", out, "--workers", workers]
        return [str(option) for option in [*options, "--samples-per-shard", 4]]

    return make


def test_no_room_for_a_shard(command, write_records, good_record, tmp_path):
    """The system refuses files above a size, as a full disk refuses more bytes: exit 1, whole files only; with room the
    same command goes on where it stopped."""
    source = write_records([good_record(f"r{i}", image_input=["c.png", "a.png"][: 1 + i // 8]) for i in range(12)])
    assert main(command(source, tmp_path / "calm", 0)) == 0
    sizes = [(tmp_path / "calm" / f"shard-00000{n}.tar").stat().st_size for n in range(3)]
    limit = max(sizes[:2]) // 1024 + 4  # KiB; the third shard is larger
    assert sizes[2] > (limit + 20) * 1024
    limited = ["bash", "-c", f'ulimit -f {limit}; exec "$@"', "bash", sys.executable, "data_tools/build_shards.py"]
    full = subprocess.run(
        [*limited, *command(source, tmp_path / "out", 2)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert full.returncode == 1
    assert "shard-000002.tar: cannot write: File too large; make room" in full.stderr
    assert "Traceback" not in full.stderr
    left = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert not [name for name in left if name.endswith(".tmp")]
    assert not left & {"shard-000002.tar", "shard-000002.json", "manifest.json"}
    assert main(command(source, tmp_path / "out", 0)) == 0
    assert files(tmp_path / "out") == files(tmp_path / "calm")


def test_targets_and_inputs_that_cannot_be_used(command, write_records, good_record, tmp_path, capsys):
    source = write_records([good_record("a")])
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nothing/here")):
        assert main(command(source, out, 0)) == 1
        error = capsys.readouterr().err
        assert f"error: {out}" in error and "cannot write" in error
    (tmp_path / "empty").mkdir()
    assert main(command(tmp_path / "empty", tmp_path / "out", 0)) == 1
    assert f"--input {tmp_path / 'empty'}: no record files there" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_finished_shard_is_never_left_without_its_bytes(tokenizer, write_records, good_record, tmp_path):
    """All names of a build that is through: no temporary one, in OUT or in OUT/progress."""
    source = write_records([good_record(f"r{i}") for i in range(4)])
    settings = BuildSettings((source,), "ilvr", tmp_path, tmp_path / "out", samples_per_shard=2)
    build(settings, tokenizer, lambda progress: None, workers=2)
    names = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*"))
    names = [name for name in names if not name.startswith("progress/lines-")]  # and the input's sha256
    assert names == ["index.npy", "manifest.json", "progress", "progress/build.json", "progress/shard-000000.json",
                     "progress/shard-000001.json", "progress/survey.npz", "rejects.jsonl", "shard-000000.tar",
                     "shard-000001.tar"]  # fmt: skip


def test_workers_end_with_their_parent(command, write_records, good_record, tmp_path):
    """A killed build leaves no process that goes on writing into a folder another build may have taken up."""
    source = write_records([good_record(f"r{i}") for i in range(30_000)])  # each worker has one shard: half a minute
    arguments = [sys.executable, "data_tools/build_shards.py", *command(source, tmp_path / "out", 2)]
    arguments += ["--samples-per-shard", "15000"]
    build_process = subprocess.Popen(
        arguments, cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + 60
    while len(list((tmp_path / "out").glob("*.tar.*.tmp"))) < 2 and time.monotonic() < until:
        time.sleep(0.02)
    below = psutil.Process(build_process.pid).children(recursive=True)
    build_process.kill()
    build_process.wait()
    assert len(below) >= 3  # the fork server, two workers
    _, alive = psutil.wait_procs(below, timeout=5)
    for process in alive:
        process.kill()
    assert alive == []
    assert len(list((tmp_path / "out").glob("*.tar.*.tmp"))) == 2  # they were at work


def test_a_build_that_stops_leaves_nothing_half_written(command, write_records, good_record, tmp_path, capsys):
    """Workers are in the middle of shards when the rejects become too many."""
    bad = [good_record(f"m{i}", image_input="none.png") for i in range(3)]
    source = write_records([*bad, *[good_record(f"r{i}") for i in range(600)]])
    options = [*command(source, tmp_path / "out", 2), "--max-reject-fraction", "0.001", "--samples-per-shard", "300"]
    assert main(options) == 1
    assert re.search(r"[123] of 603 records are rejected", capsys.readouterr().err)
    names = [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not [name for name in names if name.endswith((".tmp", ".tar"))], names


def test_temporary_files_of_a_killed_build_are_removed(command, write_records, good_record, tmp_path):
    """Those of a build's own shards, whoever left them; another job's are its own affair until the merge."""
    source = write_records([good_record(f"r{i}") for i in range(16)])
    out = tmp_path / "out"
    assert main([*command(source, out, 0), "--job-index", "0", "--job-count", "2"]) == 0
    left = [out / f"shard-00000{n}.tar.0123456789ab.tmp" for n in range(3)]
    left += [out / "progress" / "shard-000002.json.0123456789ab.tmp", out / "progress" / "input-0.jsonl.ab.tmp"]
    for path in left:
        path.write_bytes(b"half")
    assert main([*command(source, out, 0), "--job-index", "0", "--job-count", "2"]) == 0
    assert [path.exists() for path in left] == [False, True, False, False, True]
    assert main(command(source, out, 0)) == 0
    assert not list(out.rglob("*.tmp"))


def test_a_file_that_is_not_finished_leaves_no_trace(tmp_path):
    (tmp_path / "x").write_text("before")
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "x") as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_text() == "before"
