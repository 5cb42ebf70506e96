"""The table of published models and data sets that `data_tools.download` fetches (`hubs.toml`)."""

import difflib
import re
import tomllib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from nanovlm.errors import NanoVLMError, quoted
from nanovlm.utils.config import from_dict

TABLE = Path(__file__).with_name("hubs.toml")
PRESETS = Path(__file__).parents[1] / "nanovlm" / "presets"
HUBS = ("hf", "hf-mirror", "modelscope")
# Never fetched unless a pattern names the ending: these run code when they are opened, or are the
# same weights once more.
_NEVER = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".h5", ".msgpack",
          ".onnx", ".gguf", ".py")  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One name of the table: where it is published, which files are needed, what they become."""

    name: str
    kind: str  # "weights" or "data": the folder that it goes into
    licence: str
    hf: str = ""  # repository on Hugging Face and its mirror; empty if it is on neither
    modelscope: str = ""
    files: tuple[str, ...] = ()  # patterns; * does not cross a folder, ** is every file
    tensors: str = ""  # of a checkpoint in shards, only those with tensors that begin with this
    next: tuple[str, ...] = ()  # the next commands; {folder}, {weights} and {data} are paths
    gb: float = 0.0  # about; the hub says how much exactly
    folder: str = ""  # in place of the name
    by_hand: str = ""  # what to do, where no hub has it

    def repository(self, hub: str) -> str:
        """Its repository on a hub of HUBS; empty if it is not there."""
        return self.modelscope if hub == "modelscope" else self.hf

    @property
    def hubs(self) -> list[str]:
        """The hubs that have it."""
        return [hub for hub in HUBS if self.repository(hub)]

    @property
    def has_subsets(self) -> bool:
        """Whether it is fetched by subset, as NAME/SUBSET."""
        return any("{subset}" in pattern for pattern in self.files)

    def folder_in(self, to: Path) -> Path:
        """Where it is fetched to."""
        return to / self.kind / (self.folder or self.name)

    def wants(self, path: str, subset: str = "") -> bool:
        """Whether the file at `path` of the repository is one of those needed."""
        return any(_matches(path, pattern.replace("{subset}", subset)) for pattern in self.files)


def _matches(path: str, pattern: str) -> bool:
    if path.endswith(_NEVER) and not pattern.endswith(_NEVER):
        return False
    if pattern == "**":
        return not path.startswith(".git")
    names, patterns = path.split("/"), pattern.split("/")
    return len(names) == len(patterns) and all(map(fnmatchcase, names, patterns))


def read_table() -> dict[str, Entry]:
    """All entries, by name."""
    tables = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    return {
        name: from_dict(Entry, {"name": name, **values}, where=f"{TABLE.name}, [{name}]")
        for name, values in tables.items()
    }


def find_entry(given: str) -> tuple[Entry, str]:
    """The entry of a name as typed, NAME or NAME/SUBSET, and the subset."""
    table = read_table()
    name, _, subset = given.partition("/")
    if name not in table:
        hub_names = {
            repository.lower(): entry.name
            for entry in table.values()
            for repository in (entry.hf, entry.modelscope)
            if repository
        }
        known = {**dict.fromkeys(table, ""), **hub_names}
        near = difflib.get_close_matches(given.lower()[:100], list(known), n=1, cutoff=0.5)
        advice = f"did you mean {known[near[0]] or near[0]}?" if near else "--list shows the names"
        raise NanoVLMError(f"{quoted(given)}: is no name of the table; {advice}")
    entry = table[name]
    if entry.has_subsets and not subset.strip("."):
        raise NanoVLMError(
            f"{name}: is fetched by subset, such as {name}/aokvqa; its subsets are the folders of "
            f"https://huggingface.co/datasets/{entry.hf}/tree/main"
        )
    if "/" in subset or (subset and not entry.has_subsets):
        raise NanoVLMError(f"{quoted(given)}: has no such subset; take {name}")
    if entry.by_hand:
        raise NanoVLMError(f"{name}: is on no hub; {entry.by_hand}")
    return entry, subset


def next_commands(names: list[str], to: Path) -> list[list[str]]:
    """What to type after names were fetched to `to`: for each name one command, or two in turn.

    Names whose command trains a preset of which a part is not there are left out, unless all are.
    """
    found: dict[tuple[str, ...], bool] = {}
    for name in names:
        entry, subset = find_entry(name)
        folder = entry.folder_in(to) / subset
        places = {"folder": folder, "weights": to / "weights", "data": to / "data"}
        commands = tuple(_with_places(command, places) for command in entry.next)
        found[commands] = all(_has_its_parts(command, to / "weights") for command in entry.next)
    ready = [list(commands) for commands, has_parts in found.items() if has_parts]
    return ready or [list(commands) for commands in found]


def _with_places(command: str, places: dict[str, Path]) -> str:
    """A command with paths that a shell takes as they stand."""
    texts = {name: path.as_posix() for name, path in places.items()}

    def filled(word: re.Match[str]) -> str:
        text = word[0].format(**texts)
        return f'"{text}"' if " " in text else text

    return re.sub(r"\S*\{\w+\}\S*", filled, command)


def _has_its_parts(command: str, weights: Path) -> bool:
    preset = re.search(r"--preset (\S+)", command)
    if not preset:
        return True
    stage1 = tomllib.loads((PRESETS / f"{preset[1]}.toml").read_text(encoding="utf-8"))["stage1"]
    return all((weights / stage1[part]).is_dir() for part in ("vision_encoder", "language_model"))


def list_names() -> str:
    """The table as text: a line for each name."""
    lines = [("name", "about", "on", "licence")]
    for entry in read_table().values():
        name = f"{entry.name}/SUBSET" if entry.has_subsets else entry.name
        size = f"{entry.gb:g} GB" if entry.gb else "by subset" if entry.has_subsets else ""
        lines.append((name, size, ", ".join(entry.hubs) or "by hand", entry.licence))
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "\n".join("  ".join(map(str.ljust, line[:3], widths)) + f"  {line[3]}" for line in lines)
