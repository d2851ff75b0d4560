"""The paired bootstrap: how sure is a mean difference? The same draws here and in the page's script.

Source: Efron & Tibshirani 1993, ch. 13; the generator is mulberry32 (Tommy Ettinger, public domain), whose i-th output
depends on the seed and i alone: a few lines in numpy and in JavaScript, so that report.js reproduces each interval.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RESAMPLES = 4000
LEVELS = (0.025, 0.975)  # of a 95 % interval
_WEYL = 0x6D2B79F5  # what mulberry32 adds to its state at each step


def interval(delta: NDArray[np.float64]) -> tuple[float, float]:
    """Return the 95 % interval of the mean of ``delta`` [windows] over ``RESAMPLES`` resamples of the windows."""
    import numpy as np

    low, high = np.quantile(_counts(len(delta)) @ delta / len(delta), LEVELS)
    return float(low), float(high)


def uniform(count: int) -> NDArray[np.uint32]:
    """Return the first ``count`` outputs of mulberry32 with seed 0, [count], all 32 bits of each."""
    import numpy as np

    a = np.arange(1, count + 1, dtype=np.uint32) * np.uint32(_WEYL)  # modulo 2^32, as all that follows
    t = (a ^ (a >> np.uint32(15))) * (a | np.uint32(1))
    t ^= t + (t ^ (t >> np.uint32(7))) * (t | np.uint32(61))
    drawn: NDArray[np.uint32] = t ^ (t >> np.uint32(14))
    return drawn


@lru_cache(maxsize=4)  # one for each number of windows: all rows of a report share their draws
def _counts(windows: int) -> NDArray[np.float64]:
    """Return how often each resample holds each window, [resamples, windows]."""
    import numpy as np

    drawn = (uniform(RESAMPLES * windows).astype(np.uint64) * np.uint64(windows)) >> np.uint64(32)
    places = drawn.astype(np.int64).reshape(RESAMPLES, windows) + windows * np.arange(RESAMPLES)[:, None]
    counts = np.bincount(places.ravel(), minlength=RESAMPLES * windows)
    return counts.reshape(RESAMPLES, windows).astype(np.float64)
