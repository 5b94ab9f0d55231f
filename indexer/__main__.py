"""`python -m indexer`: the same as the `indexer` command, and one clear line when a package is missing."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line of `indexer.cli`."""
    try:
        from indexer.cli import main as run

        run()
    except ModuleNotFoundError as error:
        name = error.name or ""
        if name.partition(".")[0] == "indexer":
            raise
        sys.exit(
            f"error: {sys.executable} lacks the package {name}; `make demo` installs everything "
            "into .venv (then use .venv/bin/python), or: python -m pip install -e ."
        )


if __name__ == "__main__":
    main()
