"""An AT Protocol indexer: follows the firehose, verifies everything, serves what it knows."""
