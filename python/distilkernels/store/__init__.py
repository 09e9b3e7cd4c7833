"""An append-only, memory-mapped store of teacher rows: capture once, distil many times. docs/store.md has the format."""

from ..errors import StoreError
from .data import TopKCollator, TopKDataset
from .importing import Imported, import_logprobs
from .manifest import Manifest
from .merge import StoreInfo, info, merge
from .reader import TopKReader
from .writer import TopKWriter

__all__ = [
    "Imported",
    "Manifest",
    "StoreError",
    "StoreInfo",
    "TopKCollator",
    "TopKDataset",
    "TopKReader",
    "TopKWriter",
    "import_logprobs",
    "info",
    "merge",
]
