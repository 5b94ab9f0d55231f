"""An AT Protocol indexer: follows the firehose, verifies everything, serves what it knows."""

__version__ = "0.1.0"
