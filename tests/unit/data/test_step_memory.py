"""A piece of memory is used again when nobody looks at it, and never before; across processes, too."""

import gc

import pytest
import torch
from torch import multiprocessing

from ilvr_ds.data.step_memory import StepMemory, received


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_memory_comes_back_when_the_last_view_is_gone():
    memory = StepMemory(4, shared=False)
    first = memory.take(1000)
    assert len(first) >= 1000 and first.dtype == torch.uint8
    place, view = address(first), first[10:20].view(torch.int16)
    del first
    second = memory.take(1000)
    assert address(second) != place  # somebody still looks into the first
    del view
    assert address(memory.take(1000)) == place
    del second


def test_what_is_kept_is_never_overwritten():
    memory = StepMemory(2, shared=False)
    kept = []
    for value in range(9):  # more than it remembers
        piece = memory.take(5000)
        piece[:5000] = value
        kept.append(piece[:5000])
        del piece
    assert [part.unique().tolist() for part in kept] == [[value] for value in range(9)]
    assert len({address(part) for part in kept}) == 9


def test_pieces_are_bounded_and_grow():
    memory = StepMemory(3, shared=False)
    for size in (100, 3 << 20, 50, 2 << 20, 5 << 20, 1):
        piece = memory.take(size)
        assert len(piece) > size
        del piece
        assert len(memory._pieces) <= 3
    assert len(memory._pieces) == 1  # one was in use at a time, and it grew
    held = [memory.take(100) for _ in range(5)]
    assert len(memory._pieces) == 3 and len({address(piece) for piece in held}) == 5


def test_an_empty_step():
    assert len(StepMemory(1, shared=False).take(0)) > 0


def send(steps: int, to, back) -> None:
    """A worker: a piece a step, filled with the step's number; waits for a word before each."""
    memory = StepMemory(8, shared=True)
    for step in range(steps):
        back.get()
        piece = memory.take(4096)
        piece[:4096] = step
        known = [address(p) for p in memory._pieces]
        to.put((piece, known.index(address(piece)), len(known)))
        del piece
    back.get()


@pytest.mark.timeout(120)
def test_a_piece_sent_to_another_process_comes_back_from_there():
    context = multiprocessing.get_context("spawn")
    to, back = context.SimpleQueue(), context.SimpleQueue()
    process = context.Process(target=send, args=(6, to, back), daemon=True)
    process.start()

    def step() -> tuple[torch.Tensor, int]:
        back.put(None)
        piece, _, known = to.get()
        return received(piece)[:4096], known

    first, known = step()
    second, known = step()
    assert known == 2  # the first is in use here
    assert first.unique().tolist() == [0] and second.unique().tolist() == [1]
    del first
    gc.collect()
    third, known = step()
    assert known == 2 and third.unique().tolist() == [2]  # the first one's memory
    assert second.unique().tolist() == [1]
    fourth, known = step()
    assert known == 3 and [t.unique().tolist() for t in (second, third, fourth)] == [[1], [2], [3]]
    for value in (4, 5):
        del second
        gc.collect()
        second, known = step()
        assert known == 3 and second.unique().tolist() == [value]
    back.put(None)
    process.join(30)
    assert process.exitcode == 0
