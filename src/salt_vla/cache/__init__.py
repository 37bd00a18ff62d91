"""Arrays on disk, one record a clip-view: written once, whole or not at all, and checked when read."""

from salt_vla.cache.format import CorruptRecord, Encoding, Manifest
from salt_vla.cache.reader import ArrayCache, RawRecords, open_cache
from salt_vla.cache.shards import Key, Record
from salt_vla.cache.writer import CacheWriter

__all__ = [
    "ArrayCache",
    "CacheWriter",
    "CorruptRecord",
    "Encoding",
    "Key",
    "Manifest",
    "RawRecords",
    "Record",
    "open_cache",
]
