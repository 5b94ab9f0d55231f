"""Fuzzing of the entry points for bytes of strangers: frames, archives, trees.

``python -m tests.fuzz frames|car|tree --minutes 10 [--seed N]``. Inputs start from real and from lying ones
and are changed with their structure in mind, many of them hashed and signed anew, so that deeper checks are
reached. Whatever comes out but our own errors, takes longer than a second or grows memory is a fault.
"""
