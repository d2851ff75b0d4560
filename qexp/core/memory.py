"""What the process does with memory it has freed.

glibc gives large freed tensors back to the system and asks for fresh pages for the next one; clearing those took a
tenth (float32) to a quarter (bfloat16) of a forward's seconds here. A run frees and asks for the same sizes all the
time, so it keeps what it has.

Source: mallopt(3); own measurement in benchmarks/RESULTS.md.
"""

from __future__ import annotations

import contextlib
import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt's names for its parameters
LARGEST = 32 * 2**20  # bytes: what glibc admits for the second


def keep_freed_memory(most: int = 2**30) -> None:
    """Ask malloc to keep up to ``most`` bytes at the heap's top, of pieces up to 32 MiB; without glibc do nothing.

    What an earlier run of this process left behind goes back to the system first.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.malloc_trim(0)
        libc.mallopt(MMAP_THRESHOLD, LARGEST)
        libc.mallopt(TRIM_THRESHOLD, most)
