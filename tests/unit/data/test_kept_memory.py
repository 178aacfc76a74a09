"""Freed memory is used again, not returned to the system and asked for anew."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy as np
from ilvr_ds.data.kept_memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def decode():
    return [np.ones(size, np.uint8) for size in (3_000_000, 800_000, 2_300_000, 6_000_000)]
decode()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    decode()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_pictures_do_not_ask_the_system_again():
    faults = {
        how: int(subprocess.run([sys.executable, "-c", PROGRAM, how], check=True, capture_output=True).stdout)
        for how in ("keep", "default")
    }
    assert faults["keep"] * 5 < faults["default"], faults
