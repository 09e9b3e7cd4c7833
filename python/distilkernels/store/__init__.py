"""An append-only, memory-mapped store of teacher rows: capture once, distil many times. docs/store.md has the format."""

from ..errors import StoreError
from .manifest import Manifest
from .reader import TopKReader
from .writer import TopKWriter

__all__ = ["Manifest", "StoreError", "TopKReader", "TopKWriter"]
