"""Files of the Hugging Face Hub by the id of their repository, from the local cache where they are there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from .atomic_write import is_file
from .layer_plan import PlanError, brief, reason

_ID = re.compile(
    r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\w[\w./-]*))?(?::(?P<file>\w[\w./-]*))?", re.ASCII
)
_OF_FILES = (".yaml", ".yml", ".npy", ".safetensors", ".json", ".jsonl", ".parquet")


def is_hub_id(source) -> bool:
    """Whether this can only be a repository's id: OWNER/NAME, and no file or folder of that name."""
    match = _ID.fullmatch(str(source)) if isinstance(source, str | Path) else None
    if match is None or not match["file"] and match["repo"].endswith(_OF_FILES):
        return False
    return not (is_file(source) or Path(source).is_dir())


def hub_file(source: str | Path, names: Sequence[str], field: str) -> Path:
    """The first of the files `names` that the repository `source` has, or the one that it says.

    source: OWNER/NAME, OWNER/NAME@REVISION, OWNER/NAME:path/in/it. Downloaded once, then from the cache; with
    HF_HUB_OFFLINE=1 from the cache alone. Raises PlanError, which says why there is none.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    match, why = _ID.fullmatch(str(source)), ""
    for name in [match["file"]] if match["file"] else names:
        try:
            return Path(hf_hub_download(match["repo"], name, revision=match["revision"]))
        except EntryNotFoundError as error:  # not in the repository, or offline and not in the cache
            why = why or reason(error)
        except (OSError, HFValidationError) as error:
            why = reason(error)
            break
    wanted = match["file"] or " or ".join(names)
    raise PlanError(
        f"{field}: got {brief(str(source))}, which is no file here; expected a file, or a repository of the Hub with "
        f"{wanted} ({why})"
    )


def located(source, names: Sequence[str], field: str):
    """The file that a Hub id stands for; anything else as it is."""
    return hub_file(source, names, field) if is_hub_id(source) else source
