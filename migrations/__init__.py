"""Steps of the on-disk format, numbered by the format that each one makes; run by `indexer.store.migration`.

A step is frozen once it is released: it names keyspaces by string, has codecs of its own, and imports nothing
of the store but the framework. Each is tested on a stored database of the format before it.
"""

from . import s0001_references

STEPS = (s0001_references.MIGRATION,)
