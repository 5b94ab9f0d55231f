"""Benchmarks of whole jobs: `python -m bench NAME`. Not part of the installed package."""
