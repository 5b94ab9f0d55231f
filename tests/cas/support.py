"""What the tests of the byte stores share: child processes, the files of a store."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from tests.paths import ROOT

#: Content of every size class: nothing, one byte, text, more than a chunk, what does not compress.
CONTENTS = {
    "empty": b"",
    "one byte": b"x",
    "text": b"the same line again\n" * 500,
    "several chunks": bytes(range(256)) * 10_000,
    "noise": b"".join(hashlib.sha256(number.to_bytes(4)).digest() for number in range(4_000)),
    "jpeg": b"\xff\xd8\xff\xe0" + b"scan" * 1000,
}


def child(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A Python process of ours that runs ``code``."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def tree(root: Path) -> list[str]:
    """Every file and folder below ``root``."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def temporary(root: Path) -> list[str]:
    return [name for name in tree(root) if name.endswith(".tmp")]
