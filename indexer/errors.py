"""The one tree of exceptions.

Owns every exception class of the project; foreign exceptions are translated into one of these at
the border where they appear. An error carries its data as attributes, and its message says what
was wrong and, where a person can act on it, what to do. No I/O; any thread.

::

    IndexerError
    ├── BadInput                 what somebody sent us is wrong; drop, count by reason, go on
    │   ├── SyntaxInvalid        a DID, handle, NSID, record key, TID, AT-URI, datetime, CID string
    │   ├── DagCborError         bytes are not canonical DAG-CBOR
    │   ├── RecordInvalid        a record breaks the data model (its row is flagged, the repo stands)
    │   ├── CarError             a CAR is malformed, truncated, corrupt or beyond a limit
    │   ├── MstError             a tree breaks a rule of the MST
    │   │   └── MissingBlock     a node or record that the walk needs is not there
    │   ├── CommitError          a commit object is malformed or says something else than its frame
    │   ├── SignatureInvalid     a signature does not verify, or a key cannot be used
    │   ├── FrameError           a firehose message is malformed
    │   └── DidDocumentInvalid   a DID document lacks or misstates what we need
    ├── IdentityError
    │   ├── IdentityGone         an authoritative "no": 404, 410, a document without key or PDS
    │   └── IdentityUnavailable  no answer now; try again later
    ├── FetchError               an HTTP fetch failed
    │   ├── UrlRefused           the guard for outbound URLs said no
    │   ├── FetchTransient       try again (carries ``retry_after`` seconds or None)
    │   └── FetchRefused         the host's final word (carries ``status`` and XRPC ``name``)
    ├── StoreError               our own state; stop loudly
    │   ├── BlobCorrupt          an archived file does not decode, or does not hash to its name
    │   ├── BlobMissing          nothing is stored under a digest
    │   ├── BlobUnreadable       an archived file cannot be read now: permissions, open files
    │   ├── StoreCorrupt         a row does not decode, a block does not hash to its CID
    │   ├── StoreBusy            RocksDB asks for patience (write stall); retried by the writer
    │   ├── StoreFull            the disk is full
    │   ├── StoreLocked          another process holds the database
    │   ├── DiskError            a walk's disk store is full, or cannot be used
    │   ├── StoreModeMismatch    the database was made in another mode
    │   ├── StoreVersion         the format is newer than this program
    │   └── WriterPoisoned       a commit failed; nothing more is written
    ├── DriveError               a walk through the library failed (carries ``kind``; the cause is chained)
    │   └── OrderLost            streaming order ended (carries ``need_disk``, the paused walk)
    ├── WorkerDied               a worker process died under its work, twice
    ├── RequestError             a query is refused (carries HTTP ``status`` and XRPC ``name``)
    ├── ConfigError              a setting is unknown, malformed or contradictory
    └── UpstreamError            a firehose connection broke or answered an error frame
"""

from __future__ import annotations

from typing import Any, Self


class IndexerError(Exception):
    """Base of everything this project raises on purpose."""

    #: Short snake-case name used in counters, quarantine rows and logs.
    reason: str = "error"

    def __init__(self, message: str, *, reason: str | None = None) -> None:
        super().__init__(message)
        if reason is not None:
            self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        # Attributes survive the trip back from a verifier process.
        return (_rebuild, (type(self), self.args, self.__dict__))


def _rebuild(cls: type[IndexerError], args: tuple[object, ...], state: dict[str, object]) -> IndexerError:
    error = cls.__new__(cls, *args)
    Exception.__init__(error, *args)
    error.__dict__.update(state)
    return error


class BadInput(IndexerError):
    """What somebody sent us is wrong."""

    reason = "bad_input"


class SyntaxInvalid(BadInput):
    reason = "syntax"


class DagCborError(BadInput):
    reason = "dag_cbor"


class RecordInvalid(BadInput):
    reason = "record"


class CarError(BadInput):
    reason = "car"


class MstError(BadInput):
    """``rule`` is what a tree breaks, where that has a name: ``prefix_out_of_bounds``,
    ``prefix_not_maximal``, ``key_not_utf8``, ``empty_node``, ``wrong_depth``, ``lost_depth``, ``order``;
    "" for any other."""

    reason = "mst"

    def __init__(self, message: str, *, reason: str | None = None, rule: str = "") -> None:
        super().__init__(message, reason=reason)
        self.rule = rule


class MissingBlock(MstError):
    """A block that the tree links to is absent. ``cid`` is its binary CID."""

    reason = "missing_block"

    def __init__(self, message: str, *, cid: bytes = b"", reason: str | None = None) -> None:
        super().__init__(message, reason=reason)
        self.cid = cid


class CommitError(BadInput):
    reason = "commit"


class SignatureInvalid(BadInput):
    reason = "signature"


class FrameError(BadInput):
    """``fatal``: the connection is to be dropped; otherwise only this message is refused, and ``seq``
    and ``did`` are what it says of itself, as far as they can be read."""

    reason = "frame"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        fatal: bool = True,
        seq: int | None = None,
        did: str = "",
    ) -> None:
        super().__init__(message, reason=reason)
        self.fatal = fatal
        self.seq = seq
        self.did = did


class DidDocumentInvalid(BadInput):
    reason = "did_document"


class IdentityError(IndexerError):
    reason = "identity"


class IdentityGone(IdentityError):
    """An authoritative no. ``tombstone`` is true for a DID that was deleted (410)."""

    reason = "identity_gone"

    def __init__(self, message: str, *, tombstone: bool = False) -> None:
        super().__init__(message)
        self.tombstone = tombstone


class IdentityUnavailable(IdentityError):
    reason = "identity_unavailable"


class FetchError(IndexerError):
    """``url``: where it was met, which a redirect may have made another host's; "" when nobody was asked."""

    reason = "fetch"
    url = ""

    def met_at(self, url: object) -> Self:
        self.url = str(url)
        return self


class UrlRefused(FetchError):
    reason = "url_refused"


class FetchTransient(FetchError):
    """Worth another try. ``retry_after`` is in seconds, None when the host did not say."""

    reason = "fetch_transient"

    def __init__(self, message: str, *, retry_after: float | None = None, reason: str | None = None) -> None:
        super().__init__(message, reason=reason)
        self.retry_after = retry_after


class FetchRefused(FetchError):
    """The host's final word: HTTP ``status`` and, where it spoke XRPC, the error ``name``."""

    reason = "fetch_refused"

    def __init__(self, message: str, *, status: int, name: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.name = name


class StoreError(IndexerError):
    reason = "store"


class BlobMissing(StoreError):
    """No content-addressed store holds what was asked for. ``digest`` is its SHA-256."""

    reason = "blob_missing"

    def __init__(self, digest: bytes) -> None:
        super().__init__(f"nothing is stored under sha256 {digest.hex()}")
        self.digest = digest


class BlobCorrupt(StoreError):
    """The bytes stored under ``digest``, its SHA-256, are not what was put there."""

    reason = "blob_corrupt"

    def __init__(self, digest: bytes, why: str) -> None:
        super().__init__(f"what is stored under sha256 {digest.hex()} is damaged: {why}")
        self.digest = digest


class BlobUnreadable(StoreError):
    """The system does not let us read what is stored under ``digest``, its SHA-256; it may be whole."""

    reason = "blob_unreadable"

    def __init__(self, digest: bytes, why: str) -> None:
        super().__init__(f"what is stored under sha256 {digest.hex()} cannot be read now: {why}")
        self.digest = digest


class StoreCorrupt(StoreError):
    reason = "store_corrupt"


class StoreBusy(StoreError):
    reason = "store_busy"


class StoreFull(StoreError):
    reason = "store_full"


class StoreLocked(StoreError):
    reason = "store_locked"


class StoreModeMismatch(StoreError):
    reason = "store_mode"


class StoreVersion(StoreError):
    reason = "store_version"


class WriterPoisoned(StoreError):
    reason = "writer_poisoned"


class DiskError(StoreError):
    """The disk store of a walk: its maximum is reached, or it cannot be opened, written or read."""

    reason = "spill"


class DriveError(IndexerError):
    """A walk through the library failed; ``__cause__`` is the error behind it.

    ``kind``: ``car``, ``bad_block``, ``missing_commit``, ``missing_root``, ``missing_block``, ``commit``,
    ``signature``, ``walk``, ``disk``, ``limit``, ``time``, ``source`` or ``need_disk``.
    """

    reason = "drive"

    def __init__(self, message: str, *, kind: str) -> None:
        super().__init__(message, reason=kind)
        self.kind = kind


class OrderLost(DriveError):
    """A walk that read in streaming order met blocks out of order, more than its memory limit holds.

    ``need_disk`` is the paused walk: what it gave out stands, and with a disk it goes on behind that.
    """

    def __init__(self, message: str, *, need_disk: Any) -> None:
        super().__init__(message, kind="need_disk")
        self.need_disk = need_disk


class WorkerDied(IndexerError):
    reason = "worker_died"


class RequestError(IndexerError):
    """A query is refused: HTTP ``status`` and XRPC error ``name``, as its answer shows them."""

    reason = "request"

    def __init__(self, message: str, *, status: int = 400, name: str = "InvalidRequest") -> None:
        super().__init__(message)
        self.status = status
        self.name = name


class ConfigError(IndexerError):
    reason = "config"


class UpstreamError(IndexerError):
    """A firehose connection broke. ``name`` is the error frame's name, "" for a transport fault."""

    reason = "upstream"

    def __init__(self, message: str, *, name: str = "") -> None:
        super().__init__(message)
        self.name = name
