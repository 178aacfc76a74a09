"""The launcher of test ranks itself: results by rank, errors reported, hangs ended."""

import time

import pytest
import torch
import torch.distributed as dist

from ilvr_ds.engine.testing.ranks import RankError, run_ranks


def add_ranks(number):
    total = torch.tensor(dist.get_rank() + number)
    dist.all_reduce(total)
    return dist.get_rank(), int(total)


def one_rank_raises():
    if dist.get_rank() == 1:
        raise ValueError("only here")
    dist.barrier()  # would wait for ever


def one_rank_sleeps():
    if dist.get_rank() == 1:
        time.sleep(600)


def test_results_come_back_by_rank():
    assert run_ranks(add_ranks, 2, 10) == [(0, 21), (1, 21)]


def test_an_error_on_one_rank_is_reported_and_ends_the_others():
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2 raised.*ValueError: only here"):
        run_ranks(one_rank_raises, 2)


def test_a_hang_ends_with_the_rank_named():
    with pytest.raises(RankError, match=r"ranks \[1\] did not finish"):
        run_ranks(one_rank_sleeps, 2, timeout_s=15)
