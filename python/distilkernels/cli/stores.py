"""``python -m distilkernels store``: what stores hold, whether they are sound, and one store of several."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tqdm import tqdm

from ..store import TopKReader
