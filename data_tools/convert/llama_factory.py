"""LLaMA-Factory's data folders: `dataset_info.json` names the columns of each file."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanovlm.data.tables import Row, rows
from nanovlm.errors import NanoVLMError
from nanovlm.utils.files import read_json

INFO = "dataset_info.json"
# Where a data set of it is: one of these keys.
PLACES = {"file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name"}
# Its columns → ours, with the names that they have if the file gives none.
ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "history": "history"}
SHAREGPT = {"messages": "conversations", "system": "system"}
BOTH = {key: key for key in ("system", "images", "videos", "audios", "tools", "chosen", "rejected")}
OURS = {"prompt": "instruction", "query": "input", "response": "output"}
ROLES = {"user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}
TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "system_tag": "system",
}


@dataclass(frozen=True)
class DataSet:
    """A data set of `dataset_info.json`: its file and what its columns mean."""

    folder: Path  # that image paths are relative to
    path: Path
    is_ranking: bool = False
    columns: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)  # empty: in Alpaca's form

    def rows(self) -> Iterator[Row]:
        """Its rows in a form that records have."""
        for row in rows(self.path):
            value = row.value
            if isinstance(value, dict):
                try:
                    value = self._translate(value)
                except NanoVLMError as error:
                    value = error
            yield row._replace(value=value, folder=self.folder)

    def _translate(self, row: dict[str, Any]) -> dict[str, Any]:
        found = {key: row[name] for key, name in self.columns.items() if row.get(name)}
        if not self.tags:
            answer = found.get("response")
            if self.is_ranking and isinstance(answer, list) and len(answer) == 2:  # of old versions
                del found["response"]
                found |= {"chosen": answer[0], "rejected": answer[1]}
            return {OURS.get(key, key): value for key, value in found.items()}
        for key in ("messages", "chosen", "rejected"):
            if isinstance(found.get(key), list):
                found[key] = [self._turn(turn) for turn in found[key]]
            elif isinstance(found.get(key), dict):
                found[key] = self._turn(found[key])
        return found

    def _turn(self, turn: Any) -> Any:
        role_tag, content_tag = self.tags["role_tag"], self.tags["content_tag"]
        if not isinstance(turn, dict) or role_tag not in turn:
            return turn  # which is refused with the reason
        role = next(
            (ours for tag, ours in ROLES.items() if turn[role_tag] == self.tags[tag]),
            turn[role_tag],
        )
        rest = {key: value for key, value in turn.items() if key not in (role_tag, content_tag)}
        return {**rest, "role": role, "content": turn.get(content_tag)}


def has_info(folder: Path) -> bool:
    """Whether a folder has LLaMA-Factory's file: `datasets` writes another one of this name."""
    path = folder / INFO
    entries = read_json(path).values() if path.is_file() else ()
    return any(isinstance(entry, dict) and not PLACES.isdisjoint(entry) for entry in entries)


def read_info(folder: Path) -> tuple[list[DataSet], dict[str, str]]:
    """The data sets whose files are in the folder, and why the others are left out."""
    found, left_out = [], {}
    for name, entry in read_json(folder / INFO).items():
        file = entry.get("file_name") if isinstance(entry, dict) else None
        if not isinstance(file, str):
            left_out[name] = "has no file in this folder (file_name)"
        elif not (folder / file).is_file():
            left_out[name] = f"{file} does not exist"
        elif entry.get("formatting", "alpaca") not in ("alpaca", "sharegpt", "openai"):
            left_out[name] = f"has the unknown formatting {entry['formatting']!r}"
        else:
            found.append(_data_set(folder, entry))
    return found, left_out


def _data_set(folder: Path, entry: dict[str, Any]) -> DataSet:
    is_alpaca = entry.get("formatting", "alpaca") == "alpaca"
    columns = {**BOTH, **(ALPACA if is_alpaca else SHAREGPT), **(entry.get("columns") or {})}
    tags = {} if is_alpaca else {**TAGS, **(entry.get("tags") or {})}
    if entry.get("formatting") == "openai":
        tags = {**TAGS, "role_tag": "role", "content_tag": "content", "user_tag": "user",
                "assistant_tag": "assistant", **(entry.get("tags") or {})}  # fmt: skip
    path = folder / entry["file_name"]
    return DataSet(folder, path, bool(entry.get("ranking")), columns, tags)
