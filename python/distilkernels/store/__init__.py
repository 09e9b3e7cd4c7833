"""An append-only, memory-mapped store of teacher rows: capture once, distil many times. docs/store.md has the format."""

from ..errors import StoreError
from .importing import Imported, import_logprobs
from .manifest import Manifest
from .reader import TopKReader
from .writer import TopKWriter

__all__ = ["Imported", "Manifest", "StoreError", "TopKReader", "TopKWriter", "import_logprobs"]
