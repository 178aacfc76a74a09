"""The process group: one call that works under every launcher and under none."""

from __future__ import annotations

import datetime
import logging
import os
import socket
import warnings

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from ilvr_ds.errors import ConfigError

_TORCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def init_distributed(timeout_minutes: float = 30.0) -> tuple[int, int, torch.device]:
    """Join (or make) the process group and return (rank, world size, this rank's device).

    Ranks come from, in this order: a group that is initialised already; the variables of the `deepspeed`
    and `torchrun` launchers; Slurm's `srun` (`SLURM_PROCID`, ..., with MASTER_ADDR and MASTER_PORT set by
    the batch script); nothing at all, which makes a group of one. The backend is nccl on CUDA, gloo on CPU.

    A collective that waits longer than `timeout_minutes` raises, so that one dead rank ends the run.

    Raises:
        ConfigError: a part of the launcher's variables is missing.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed still calls these two by names that torch 2.13 deprecates: one warning per collective.
    warnings.filterwarnings(
        "ignore", message=".*(all_gather_into_tensor|reduce_scatter_tensor)", category=FutureWarning
    )
    accelerator = get_accelerator()
    cuda = accelerator.device_name() == "cuda"
    if not dist.is_initialized():
        _fill_environment()
        if cuda:
            accelerator.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend="nccl" if cuda else "gloo", timeout=datetime.timedelta(minutes=timeout_minutes))
    # DeepSpeed and its ZeRO code read these even when the group exists already.
    os.environ.setdefault("LOCAL_RANK", "0" if not cuda else str(torch.cuda.current_device()))
    os.environ.setdefault("RANK", str(dist.get_rank()))
    os.environ.setdefault("WORLD_SIZE", str(dist.get_world_size()))
    if not cuda:
        # DeepSpeed would compile a shared-memory extension here, 20 s of C++ on every rank and a lock file that a
        # killed rank leaves behind for the next run to wait on. Only its inference all-reduce uses it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend=dist.get_backend(),
        auto_mpi_discovery=False,
        verbose=False,
        timeout=datetime.timedelta(minutes=timeout_minutes),
    )
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    return dist.get_rank(), dist.get_world_size(), device


def _fill_environment() -> None:
    """Make the five variables torch's `env://` reads complete, or say which one is missing."""
    present = [name for name in _TORCH_VARIABLES if name in os.environ]
    if "RANK" not in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ:
        os.environ["RANK"] = os.environ["SLURM_PROCID"]
        os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
        os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
    elif not present or (set(present) <= {"MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"}):
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(_free_port())
    missing = [name for name in _TORCH_VARIABLES if name not in os.environ]
    if missing:
        raise ConfigError(
            f"launcher environment is incomplete: {', '.join(missing)} not set. Start with the deepspeed launcher, "
            "torchrun, or srun with MASTER_ADDR and MASTER_PORT exported; plain python runs one rank."
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
