"""The step loader on real shards: same batches whatever the workers, errors with their ids, a clean end."""

import io
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel

from ilvr_ds.config import DataConfig
from ilvr_ds.contracts import ImageRef, PackedBatch, Record
from ilvr_ds.data import bundle
from ilvr_ds.data.bundle import Failure
from ilvr_ds.data.images import ImageSettings
from ilvr_ds.data.index import FORMAT_VERSION, INDEX_DTYPE, Manifest, ShardEntry, file_sha256, write_index, write_text
from ilvr_ds.data.loader import StepLoader
from ilvr_ds.data.sample_format import count_tokens, record_to_json
from ilvr_ds.data.shards import ShardSet
from ilvr_ds.data.tokens import ChatTokenizer
from ilvr_ds.errors import PlanError, RecordError, ShardError

K = 4
SAMPLES = 11


def byte_tokenizer() -> ChatTokenizer:
    """One token per byte, plus Qwen2.5-VL's control tokens and the role names."""
    vocab = {token: number for number, token in enumerate(sorted(ByteLevel.alphabet()))}
    names = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": 256 + i, "content": name, "special": True, **flags} for i, name in enumerate(names)]
    added.append({"id": 256 + len(names), "content": "assistant", "special": False, **flags})
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    spec = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    return ChatTokenizer(json.dumps(spec), "byte tokenizer")


def png(height: int, width: int, shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (shade, 255 - shade, 7)).save(file, "PNG")
    return file.getvalue()


def write_shards(folder: Path, tokenizer: ChatTokenizer, samples: int = SAMPLES, latent_size: int = K) -> ShardSet:
    """Sample i: i % 3 input images of growing size, i % 4 spans, texts of different lengths; one tar."""
    folder.mkdir(parents=True)
    rows, blobs, offset = [], [], 0
    for i in range(samples):
        inputs = {f"in{n}.png": (28 * (1 + i % 2), 28 * (n + 1)) for n in range(i % 3)}
        helpers = {f"help{n}.png": (28, 28 * (1 + n)) for n in range(i % 4)}
        sizes = {**inputs, **helpers}
        grids = {name: (1, h // 14, w // 14) for name, (h, w) in sizes.items()}
        steps = [part for name in helpers for part in ("look " * (i + 1), ImageRef(name))]
        record = Record(f"r{i}", (*map(ImageRef, inputs), "where?" * (i + 1)), (*steps, "there"), None, None, f"f:{i}")
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for name, content in [(n, png(*sizes[n], 20 * i)) for n in sizes] + [
                ("json", record_to_json(record, grids))
            ]:
                info = tarfile.TarInfo(f"{i:09d}.{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            size = tar.offset
        image_counts = [h * w // 4 for _, h, w in (grids[name] for name in inputs)]
        ids, labels = tokenizer.encode_sample(record.prompt, record.steps, image_counts, latent_size)
        counts = count_tokens(ids, labels, tuple(grids.values()), len(inputs))
        rows.append((0, offset, size, zlib.crc32(file.getvalue()[:size]), *(counts[n] for n in INDEX_DTYPE.names[4:])))
        blobs.append(file.getvalue()[:size])
        offset += size
    shard = folder / "shard-000000.tar"
    shard.write_bytes(b"".join(blobs) + bytes(1024))
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        latent_size=latent_size,
        tokenizer_fingerprint=tokenizer.vocabulary.fingerprint,
        images=ImageSettings(),
        shards=(ShardEntry(shard.name, shard.stat().st_size, file_sha256(shard), samples),),
        index_sha256=write_index(folder, np.array(rows, dtype=INDEX_DTYPE)),
        built=samples,
        rejected=0,
        reject_reasons={},
        source="test",
        source_sha256="0" * 64,
        source_format="ilvr",
        assistant="interleaved",
    )
    write_text(folder / "manifest.json", manifest.to_json())
    return ShardSet.open(folder)


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def shards(tmp_path_factory, tokenizer) -> ShardSet:
    return write_shards(tmp_path_factory.mktemp("data") / "shards", tokenizer)


def loader(shards, tokenizer, *, workers=0, rank=0, world=1, start=0, total=4, per_step=6, budget=600, **more):
    data = DataConfig(str(shards.folder), per_step, budget, workers=workers, prefetch_steps=2)
    options = {"latent_size": K, "reduction": "sample", "seed": 3, "rank": rank, "world": world}
    return StepLoader(shards, tokenizer, data, start_step=start, total_steps=total, **(options | more))


def collect(it: StepLoader) -> list:
    with it:
        return list(it)


def same_batch(a: PackedBatch, b: PackedBatch) -> bool:
    pairs = [(vars(a)[name], vars(b)[name]) for name in vars(a)]
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def test_every_rank_sees_its_bins_in_order(shards, tokenizer):
    ranks = [collect(loader(shards, tokenizer, rank=rank, world=3)) for rank in range(3)]
    for entries in zip(*ranks, strict=True):
        (step, plan, _), *_ = entries
        assert all(other[:2] == (step, plan) for other in entries)
        assert plan == loader(shards, tokenizer, world=3).planner.step(step)
        for rank, (_, _, batches) in enumerate(entries):
            assert len(batches) == plan.n_micro
            for batch, numbers in zip(batches, plan.of_rank(rank), strict=True):
                assert batch.is_filler == (not numbers)
                assert batch.sample_numbers == (numbers or (-1,))
                assert batch.sample_ids == (tuple(f"r{n}" for n in numbers) or ("<filler>",))
                assert len(batch.input_ids) <= 600
        assert sum(b.ce_weights.sum().item() for *_, bs in entries for b in bs) == pytest.approx(1, abs=1e-5)
        assert sum(b.align_weights.sum().item() for *_, bs in entries for b in bs) == pytest.approx(1, abs=1e-5)
    assert [step for step, *_ in ranks[0]] == [0, 1, 2, 3]
    first_epoch = [n for entries in ranks for _, _, bs in entries[:2] for b in bs for n in b.sample_numbers if n >= 0]
    assert sorted(first_epoch) == list(range(SAMPLES))


def test_an_empty_bin_is_a_filler(shards, tokenizer):
    data = [collect(loader(shards, tokenizer, rank=r, world=4, per_step=2, total=1)) for r in range(4)]
    batches = [entries[0][2] for entries in data]
    assert [len(b) for b in batches] == [1] * 4
    assert sorted(b[0].is_filler for b in batches) == [False, False, True, True]


def test_same_batches_whatever_the_number_of_workers(shards, tokenizer):
    reference = collect(loader(shards, tokenizer))
    for workers in (1, 2):
        entries = collect(loader(shards, tokenizer, workers=workers))
        assert [e[:2] for e in entries] == [e[:2] for e in reference]
        for (*_, ours), (*_, theirs) in zip(entries, reference, strict=True):
            assert len(ours) == len(theirs) and all(map(same_batch, ours, theirs))


def test_workers_use_their_memory_again_and_batches_that_are_kept_stay(shards, tokenizer, monkeypatch):
    """Of 40 steps two are kept to the end: what is in them is not written over, and the others share a few pieces."""
    pieces = []

    def received(piece: torch.Tensor) -> torch.Tensor:
        pieces.append(os.fstat(piece.untyped_storage()._share_fd_cpu_()[0]).st_ino)
        return real(piece)

    real = bundle.received
    monkeypatch.setattr(bundle, "received", received)
    reference = dict(enumerate(collect(loader(shards, tokenizer, total=40))))
    kept = {}
    with loader(shards, tokenizer, workers=1, total=40) as steps:
        for step, _, batches in steps:
            assert all(map(same_batch, batches, reference[step][2]))
            if step in (3, 17):
                kept[step] = batches
    assert sorted(kept) == [3, 17]
    assert all(all(map(same_batch, batches, reference[step][2])) for step, batches in kept.items())
    assert len(pieces) == 40 and len(set(pieces)) <= 2 + 5  # kept, and: two ahead, in hand, being decoded, on its way


def test_only_what_is_used_goes_to_pinned_memory(shards, tokenizer, monkeypatch):
    made = loader(shards, tokenizer)._loader.dataset[0]
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)  # pinning needs a CUDA device
    pinned = made.pin_memory()
    batches = made.batches()
    assert all(map(same_batch, pinned.batches(), batches))
    size = sum(batch.pixels.nbytes for batch in batches)
    assert len(pinned.pixels) == made.used == size > 0 and len(made.pixels) > size


def test_starting_later_continues_the_same_run(shards, tokenizer):
    whole = collect(loader(shards, tokenizer, total=5))
    rest = collect(loader(shards, tokenizer, start=3, total=5))
    assert [e[:2] for e in rest] == [e[:2] for e in whole[3:]]
    assert all(same_batch(a, b) for x, y in zip(rest, whole[3:], strict=True) for a, b in zip(x[2], y[2], strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_arrives_as_its_own_error(tmp_path, tokenizer, workers):
    bad = write_shards(tmp_path / "shards", tokenizer)
    row = bad.index[5]  # r5 has images; break the bytes of its first member's picture
    with (bad.folder / "shard-000000.tar").open("r+b") as file:
        file.seek(int(row["offset"]) + 512 + 20)
        file.write(b"\xff" * 30)
    it = loader(bad, tokenizer, workers=workers, total=2)
    with pytest.raises(ShardError, match=r"shard-000000.tar: sample 5 .*key 000000005.*crc32"), it:
        for _ in it:
            pass
    assert not workers or not alive_children()


def test_every_error_class_survives_the_way_out_of_a_worker():
    origin = RecordError("broken", "no good", origin="a.jsonl:3", record_id="r", field="steps")
    rebuilt = pickle.loads(pickle.dumps(Failure.of(origin))).rebuild()
    assert type(rebuilt) is RecordError and str(rebuilt) == str(origin)
    assert (rebuilt.reason, rebuilt.record_id, rebuilt.field) == ("broken", "r", "steps")


def test_errors_before_the_first_step(shards, tokenizer):
    with pytest.raises(PlanError, match="'r") as caught:
        loader(shards, tokenizer, budget=150)
    assert "data.token_budget" in str(caught.value)
    with pytest.raises(ShardError, match=r"latent\.size"):
        loader(shards, tokenizer, latent_size=K + 1)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        loader(shards, tokenizer, rank=2, world=2)


def alive_children() -> list[int]:
    return [p.pid for p in multiprocessing.active_children()]


def test_leaving_early_ends_the_workers(shards, tokenizer):
    before = set(alive_children())
    with loader(shards, tokenizer, workers=2, total=10_000) as it:
        for step, *_ in it:
            assert set(alive_children()) - before
            assert it.last_wait_s > 0
            if step == 1:
                break
    assert set(alive_children()) <= before


@pytest.mark.parametrize("moment", ["starting", "running"])
def test_workers_end_with_a_killed_parent(shards, moment):
    """A launcher kills a rank without warning: nothing may stay behind. `starting`: the workers still import."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    parent = subprocess.Popen(
        [sys.executable, __file__, str(shards.folder), moment], stdout=subprocess.PIPE, text=True, env=environment
    )
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert len(workers) == 2
    deadline = time.monotonic() + 30
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.2)
    left = [pid for pid in workers if is_running(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_workers_leave_stop_signals_to_the_trainer(shards, tokenizer, number):
    """Ctrl-C and a scheduler's warning go to every process of a job; the data must keep coming."""
    with loader(shards, tokenizer, workers=1) as it:
        steps = iter(it)
        for pid in alive_children():  # also while the worker is still starting
            os.kill(pid, number)
        seen = [next(steps)[0]]
        for pid in alive_children():
            os.kill(pid, number)
        seen += [step for step, _, _ in steps]
    assert seen == [0, 1, 2, 3]
    assert not alive_children()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_iterated_once(shards, tokenizer):
    with loader(shards, tokenizer, total=1) as it:
        assert len(list(it)) == 1
        it.close()
    used = loader(shards, tokenizer)
    next(iter(used))
    with pytest.raises(RuntimeError, match="once"):
        iter(used)


if __name__ == "__main__":  # run as a script by test_workers_end_with_a_killed_parent
    tok = byte_tokenizer()
    running = iter(loader(ShardSet.open(sys.argv[1]), tok, workers=2, total=1000))
    if sys.argv[2] == "running":
        next(running)
    print(*[p.pid for p in multiprocessing.active_children()], flush=True)
    time.sleep(600)
