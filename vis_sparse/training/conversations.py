"""Conversations about images in LLaVA's format: a JSON list (or lines) of {image, conversations: [{from, value}]}."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..calibration.records import SampleError
from ..plans.atomic_write import is_file
from ..plans.layer_plan import brief

IMAGE = "<image>"
_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class Conversation:
    """messages: as chat templates take them, images first to last where the text said `<image>`; the last one is the
    assistant's. images: their files, in that order."""

    messages: tuple[dict, ...]
    images: tuple[Path, ...] = ()

    @property
    def answers(self) -> list[int]:
        """Indices of the assistant's messages."""
        return [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]


def read_conversations(file: str | Path, images: str | Path | None = None) -> list[Conversation]:
    """The conversations of a .json or .jsonl file.

    A row has `conversations`, turns of human and gpt (a system turn may come first), and `image`: a path, several in a
    list, or none for text alone, relative to the folder `images` (by default the file's own). Each image has its
    `<image>` in a human turn. Raises SampleError naming the row for anything else, images that are missing included.
    """
    file = Path(file)
    if not is_file(file) or file.suffix not in (".json", ".jsonl"):
        raise SampleError(f"data: got {brief(str(file))}, expected a .json or .jsonl file of conversations")
    folder = file.parent if images is None else Path(images)
    found = [_conversation(row, f"{file}, row {index}", folder) for index, row in enumerate(_rows(file), 1)]
    if not found:
        raise SampleError(f"data: got {file} without a row, expected conversations")
    return found


def digest(conversations: Sequence[Conversation]) -> str:
    """Hex digest of what is said and of which image files: their names, sizes and times of change."""
    sha = hashlib.sha256()
    for conversation in conversations:
        sha.update(json.dumps(conversation.messages, sort_keys=True).encode())
        for image in conversation.images:
            facts = image.stat()
            sha.update(f"{image.name} {facts.st_size} {facts.st_mtime_ns}".encode())
    return sha.hexdigest()


def _rows(file: Path) -> Iterator[object]:
    try:
        text = file.read_text(encoding="utf-8")
        rows = json.loads(text) if file.suffix == ".json" else [json.loads(line) for line in text.splitlines() if line]
    except (OSError, ValueError, RecursionError) as error:
        raise SampleError(f"{file}: expected JSON ({error})") from None
    if not isinstance(rows, list):
        raise SampleError(f"{file}: got {brief(rows)}, expected a list of conversations")
    return iter(rows)


def _conversation(row, where: str, folder: Path) -> Conversation:
    turns = row.get("conversations") if isinstance(row, dict) else None
    if not isinstance(turns, list) or not turns:
        raise SampleError(f"{where}: got {brief(row)}, expected conversations: [{{from, value}}, ...]")
    images = row.get("image")
    images = [] if images is None else images if isinstance(images, list) else [images]
    for image in images:
        if not isinstance(image, str) or not is_file(folder / image):
            raise SampleError(f"{where}: image: got {brief(image)}, expected an existing file in {folder}")
    messages = tuple(_message(turn, where) for turn in turns)
    roles = [message["role"] for message in messages]
    said = roles[1:] if roles[0] == "system" else roles
    if len(said) % 2 or any(role != ("user", "assistant")[index % 2] for index, role in enumerate(said)) or not said:
        raise SampleError(f"{where}: got turns of {', '.join(roles)}, expected user and assistant in turns")
    shown = sum(part["type"] == "image" for message in messages for part in message["content"])
    if shown != len(images):
        raise SampleError(f"{where}: got {shown} {IMAGE} for {len(images)} images, expected one for each")
    return Conversation(messages, tuple(folder / image for image in images))


def _message(turn, where: str) -> dict:
    if not isinstance(turn, dict) or turn.get("from") not in _ROLES or not isinstance(turn.get("value"), str):
        raise SampleError(f"{where}: got the turn {brief(turn)}, expected from (human or gpt) and value")
    role, content = _ROLES[turn["from"]], []
    for index, piece in enumerate(turn["value"].split(IMAGE)):
        if index:
            content.append({"type": "image"})
        if piece.strip():
            content.append({"type": "text", "text": piece.strip()})
    if role != "user" and any(part["type"] == "image" for part in content) or not content:
        raise SampleError(f"{where}: got the turn {brief(turn)}, expected text, and {IMAGE} in human turns alone")
    return {"role": role, "content": content}
