"""The commands behind `indexer.cli`: one module a group, imported only when called."""
