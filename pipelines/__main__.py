"""Reads arguments and the sealed environment, writes to the terminal: the ``cca`` command of a submitted run."""

from __future__ import annotations

import sys

from cca_core.config import ConfigError
from pipelines.cli import main
from pipelines.sealed import unseal

if __name__ == "__main__":
    try:
        unseal()
    except ConfigError as error:
        sys.exit(f"error: {error}")
    main()
