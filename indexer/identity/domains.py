"""Which hosts belong together: the domain that somebody registered, by a rule instead of a list.

Owns the rule. It is for fairness among strangers, not for trust: too large a group costs time, no more. Pure.
"""

from __future__ import annotations

from typing import Final

#: Labels under which countries let people register, as in `example.co.uk`.
_SECOND_LEVEL: Final = frozenset(("ac", "co", "com", "edu", "go", "gov", "ne", "net", "or", "org"))
_COUNTRY: Final = 2


def domain_of(host: str) -> str:
    """The last two labels of ``host``, three below `co.uk` and its like; an address stays whole."""
    host = host.rstrip(".").lower()
    labels = host.split(".")
    if ":" in host or labels[-1].isdigit():
        return host
    wide = len(labels) > 2 and len(labels[-1]) == _COUNTRY and labels[-2] in _SECOND_LEVEL
    return ".".join(labels[-3 if wide else -2 :])
