"""Names for the protocol's plain values, in one place. No code.

Everything binary stays binary inside the program: a CID is its 36 raw bytes, never a string; the
string forms appear only at the edges (JSON, logs, commands).
"""

from __future__ import annotations

from typing import TypeAlias

Did: TypeAlias = str  # "did:plc:…" or "did:web:…"
Handle: TypeAlias = str  # lower case, without "@"
Nsid: TypeAlias = str
Rkey: TypeAlias = str
Path: TypeAlias = str  # "collection/rkey": ASCII, so str order is byte order is tree order
Cid: TypeAlias = bytes  # binary CIDv1, 36 bytes: 01 (71|55) 12 20 + SHA-256 digest
Rev: TypeAlias = str  # a TID; lexicographic order is time order
DidKey: TypeAlias = str  # "did:key:z…"
Seq: TypeAlias = int  # upstream sequence number
EventId: TypeAlias = int  # our own log position, from 1
Micros: TypeAlias = int  # microseconds since the Unix epoch
