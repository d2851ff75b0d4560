"""What the process does with memory it has freed.

glibc gives freed tensors above a fraction of a megabyte back to the system and asks for fresh pages for the next one;
clearing those pages took a tenth (float32) to a quarter (bfloat16) of a forward's seconds here. A run frees and asks
for the same sizes all the time, so it keeps what it has.

Source: mallopt(3); own measurement in benchmarks/RESULTS.md.
"""

from __future__ import annotations

import contextlib
import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt's names for its parameters
LARGEST = 32 * 2**20  # bytes: what glibc admits for the second


def keep_freed_memory(most: int = 2**30) -> None:
    """Have malloc keep up to ``most`` bytes of freed memory, in pieces of up to 32 MiB; without glibc do nothing."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(MMAP_THRESHOLD, LARGEST)
        mallopt(TRIM_THRESHOLD, most)
