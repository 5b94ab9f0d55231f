"""`python -m tests.lint`: style, format and strict types, each told by one line at the end.

Runs `ruff check`, `ruff format --check` and `mypy` as their own processes with this interpreter;
all three run even when one fails. Exit code 1 when any of them complains.
"""

from __future__ import annotations

import subprocess
import sys

STEPS = {
    "style": ["ruff", "check", "--quiet", "."],
    "format": ["ruff", "format", "--quiet", "--check", "."],
    "types": ["mypy", "--no-error-summary"],
}


def main() -> int:
    """Run every step; 0 when all are clean."""
    clean = {
        name: subprocess.run([sys.executable, "-m", *command], check=False).returncode == 0
        for name, command in STEPS.items()
    }
    print(", ".join(f"{name}: {'clean' if ok else 'COMPLAINTS'}" for name, ok in clean.items()))
    return 0 if all(clean.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
