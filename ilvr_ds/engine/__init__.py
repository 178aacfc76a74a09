"""DeepSpeed: build, step, momentum teacher, checkpoint. The only part that imports deepspeed.

DeepSpeed picks its accelerator when it is first imported, so the choice is made here, before any
module of this package imports it: CUDA where torch sees a device, the CPU otherwise. Set
`DS_ACCELERATOR` to choose another.
"""

import os

import torch

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
