"""Progress bars that stay quiet in logs."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from tqdm import tqdm


def progress(items: Iterable, stage: str, total: int, unit: str = "step") -> tqdm:
    """A bar named `stage`: alive in a terminal, a line every 20 seconds elsewhere."""
    interval = 0.2 if sys.stderr.isatty() else 20.0
    return tqdm(items, desc=f"{stage:<20}", total=total, unit=unit, mininterval=interval, miniters=1, dynamic_ncols=True)
