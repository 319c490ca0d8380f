"""Where the project keeps what it can make again."""

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """A folder of the user's cache: `$XDG_CACHE_HOME/vis_sparse/<name>`, by default below `~/.cache`. It may not be
    there yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vis_sparse" / name
