"""Strict loading: a checkpoint's tensors become a module's parameters, and none is held twice.

Lesson: lessons/source/12_weights.py.
"""

from collections.abc import Callable, Collection, Iterable, KeysView, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch
from torch import Tensor, nn

from nanovlm.errors import NanoVLMError, quoted
from nanovlm.hub.config_json import explain_folder
from nanovlm.hub.names import Split, Target
from nanovlm.hub.safetensors import ALIGNMENT, SafetensorsFile
from nanovlm.utils.files import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Bytes. Larger tensors are read from memory for each product, up to a sixth slower where they
# straddle cache lines.
LARGE = 2**20

# Ends of names that only quantised weights have: of GPTQ, AWQ, bitsandbytes, FP8 and others.
QUANTIZED = (
    ".qweight", ".qzeros", ".SCB", ".absmax", ".weight_packed", ".weight_scale",
    ".weight_scale_inv", ".weight_zero_point",
)  # fmt: skip

# What can be wrong with a file's tensors, and what it means.
PROBLEM_KINDS = {
    "missing": "the model needs them, the file has none",
    "unexpected": "the file has them, the model has no place for them",
    "mapped twice": "two tensors of the file claim one place",
    "mis-shaped": "shapes differ",
    "wrong dtype": "floating-point, integer and boolean tensors do not stand in for each other",
    "tied but stored with different values": "one parameter cannot be both",
}
Problems = dict[str, list[str]]  # lines of the report, by kind
LINES_PER_KIND = 10  # in a report; a wrong config makes hundreds of problems of one kind


class Checkpoint:
    """The tensors of one or several safetensors files, each read when it is asked for.

    `metadata` is that of all files together.
    """

    def __init__(self, path: Path, files: list[SafetensorsFile]):
        self.path = path
        self.metadata: dict[str, str] = {}
        self._files: dict[str, SafetensorsFile] = {}
        for file in files:
            self.metadata |= file.metadata
            self._files |= dict.fromkeys(file.keys(), file)

    def keys(self) -> KeysView[str]:
        """The tensors' names."""
        return self._files.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor `name`."""
        return self._file(name).shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which the tensor `name` is stored."""
        return self._file(name).dtype(name)

    def tensor(self, name: str) -> Tensor:
        """The tensor `name`, a view of its file's private mapping (`SafetensorsFile.tensor`)."""
        return self._file(name).tensor(name)

    def forget(self, name: str) -> None:
        """Free the memory of a tensor that has been copied (`SafetensorsFile.forget`)."""
        self._file(name).forget(name)

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._files:
            raise NanoVLMError(f"{self.path}: holds no tensor {quoted(name)}")
        return self._files[name]


def open_checkpoint(folder_or_file: str | Path) -> Checkpoint:
    """Open a model folder, a safetensors file, or the index (`….index.json`) of a sharded one.

    In a folder, `model.safetensors` comes before `model.safetensors.index.json`, as in the hub's
    tools. Raises NanoVLMError if there is neither, if a file is damaged, or if the shards do not
    hold what the index says.
    """
    path = Path(folder_or_file)
    if path.is_dir():
        found = [path / name for name in (SINGLE_FILE, INDEX_FILE) if (path / name).exists()]
        if not found:
            lacks = f"neither {SINGLE_FILE} nor {INDEX_FILE}"
            if others := sorted(file.name for file in path.glob("*.safetensors")):
                lacks += f", but {_some(others)}; fetch the index, or take a folder with one"
            elif any(path.glob("*.bin")):
                lacks += (
                    ", and .bin files are not read; data_tools/extract_vision.py takes vision "
                    "encoders out of them"
                )
            raise NanoVLMError(f"{path}: {explain_folder(path, lacks)}")
        path = found[0]
    files = _open_shards(path) if path.name.endswith(".index.json") else [SafetensorsFile(path)]
    for file in files:
        file.check_end()
        _refuse_quantized(file)
    return Checkpoint(path, files)


def _refuse_quantized(file: SafetensorsFile) -> None:
    for name in file.keys():
        if name.endswith(QUANTIZED):
            raise NanoVLMError(
                f"{file.path}: its weights are quantised (it holds {quoted(name)}), which is not "
                "read; take the folder with the full weights, in bf16, fp16 or fp32"
            )


def _open_shards(index: Path) -> list[SafetensorsFile]:
    weight_map = read_json(index).get("weight_map")
    named = isinstance(weight_map, dict)
    if not named or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise NanoVLMError(
            f"{index}: weight_map does not give each tensor the name of a file; "
            "fetch the index again"
        )
    names_of: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        names_of.setdefault(shard, set()).add(name)
    absent = [shard for shard in names_of if _is_plain_name(shard)]
    absent = sorted(shard for shard in absent if not (index.parent / shard).exists())
    if absent:
        raise NanoVLMError(
            f"{index}: names {_some(absent)}, which the folder lacks "
            f"({len(absent)} of {len(names_of)} files); fetch what is missing"
        )
    return [_open_shard(index, shard, names) for shard, names in names_of.items()]


def _open_shard(index: Path, shard: str, names: set[str]) -> SafetensorsFile:
    """Open one file of a sharded checkpoint, which has to hold exactly `names`."""
    if not _is_plain_name(shard):
        raise NanoVLMError(
            f"{index}: names the shard {quoted(shard)}; a shard is a file in the index's own folder"
        )
    file = SafetensorsFile(index.parent / shard)
    if absent := sorted(names - file.keys()):
        raise NanoVLMError(
            f"{file.path}: lacks {_some(absent)}, which its index places there; fetch both again"
        )
    if extra := sorted(file.keys() - names):
        raise NanoVLMError(
            f"{file.path}: holds {_some(extra)}, which its index does not name; fetch both again"
        )
    return file


def _is_plain_name(name: str) -> bool:
    """Whether `name` cannot leave its folder, on any system."""
    return name == PurePosixPath(name).name == PureWindowsPath(name).name and name not in ("", "..")


def load_into(  # noqa: PLR0913 (what is loaded into what, and four things that some callers say)
    module: nn.Module,
    checkpoint: Checkpoint,
    name_map: Callable[[str], Target],
    *,
    dtype: torch.dtype | None = None,
    ignore: Collection[str] = (),
    tied: Mapping[str, str] = {},
    aligned: bool = True,
) -> None:
    """Fill every parameter and persistent buffer of `module` with exactly one stored tensor.

    Build the module under `with torch.device("meta")`, so that it holds no weights of its own. Its
    parameters become the checkpoint's tensors themselves, on the CPU: views of the private file
    mapping where no cast is needed (an optimizer's in-place step copies just the pages it writes,
    and the file stays as it is); one copy where a cast is needed, or where the file does not align
    a large tensor to cache lines. Tied names, such as a head that is the embedding, get one
    parameter; a file that stores both must store them equal. Non-persistent buffers are not loaded:
    a module built on meta has to compute them.

    name_map: a tensor's name in the checkpoint → the name in the module, a `Split` where it holds
        several of ours, or None for a tensor deliberately not used.
    dtype: of the loaded floating-point tensors; None keeps the file's. Integers and booleans are
        never cast.
    ignore: shell-style patterns of checkpoint names deliberately not used.
    tied: other names of tensors that the module has; a file may hold them besides or instead.
    aligned: whether a large tensor is copied where the file does not align it to cache lines.

    Raises one NanoVLMError with every problem, before the module is touched.
    """
    targets = module.state_dict(keep_vars=True)
    targets |= {name: targets[same] for name, same in tied.items()}
    names_of: dict[int, list[str]] = {}  # all names of one parameter
    for name, target in targets.items():
        names_of.setdefault(id(target), []).append(name)

    problems: Problems = {kind: [] for kind in PROBLEM_KINDS}
    sources = _find_sources(checkpoint, name_map, ignore, targets, problems)
    _check_filled(names_of.values(), sources, targets, problems)
    _raise_problems(module, checkpoint, problems)

    for names in names_of.values():
        tensor = _take([sources[name] for name in names if name in sources], dtype, aligned)
        target = targets[names[0]]
        if isinstance(target, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=target.requires_grad)
        for name in (name for name in names if name not in tied):
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, tensor)


@dataclass(frozen=True)
class _Source:
    """What fills one name of the module: a stored tensor, or a piece of one."""

    checkpoint: Checkpoint
    stored: str
    split: Split | None = None
    index: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The piece's; the whole tensor's where it cannot be split, so that it counts as wrong."""
        shape = self.checkpoint.shape(self.stored)
        return (self.split and self.split.piece_shape(shape)) or shape

    @property
    def dtype(self) -> torch.dtype:
        return self.checkpoint.dtype(self.stored)

    def tensor(self) -> Tensor:
        tensor = self.checkpoint.tensor(self.stored)
        return tensor if self.split is None else self.split.piece(tensor, self.index)


def _find_sources(
    checkpoint: Checkpoint,
    name_map: Callable[[str], Target],
    ignore: Collection[str],
    targets: Mapping[str, Tensor],
    problems: Problems,
) -> dict[str, _Source]:
    """What fills each name of the module; stored tensors that do not fit go to `problems`."""
    sources: dict[str, _Source] = {}
    for stored in checkpoint.keys():
        ignored = any(fnmatchcase(stored, pattern) for pattern in ignore)
        target = None if ignored else name_map(stored)
        for name, source in _pieces(checkpoint, stored, target):
            if name not in targets:
                line = f"{_renamed(stored, name)} {checkpoint.shape(stored)}"
                problems["unexpected"].append(line)
            elif name in sources:
                line = f"{name}: from {sources[name].stored} and from {stored}"
                problems["mapped twice"].append(line)
            else:
                sources[name] = source
                _check_fit(name, targets[name], source, problems)
    return sources


def _pieces(checkpoint: Checkpoint, stored: str, target: Target) -> list[tuple[str, _Source]]:
    """The names that the tensor `stored` fills: none, one, or those of a `Split`."""
    if isinstance(target, Split):
        return [
            (name, _Source(checkpoint, stored, target, index))
            for index, name in enumerate(target.names)
        ]
    return [] if target is None else [(target, _Source(checkpoint, stored))]


def _check_fit(name: str, target: Tensor, source: _Source, problems: Problems) -> None:
    renamed = _renamed(source.stored, name)
    if source.shape != tuple(target.shape):
        line = f"{renamed}: file {source.shape}, model {tuple(target.shape)}"
        problems["mis-shaped"].append(line)
    both_floating = source.dtype.is_floating_point and target.dtype.is_floating_point
    if source.dtype != target.dtype and not both_floating:
        problems["wrong dtype"].append(f"{renamed}: file {source.dtype}, model {target.dtype}")


def _check_filled(
    tied_names: Iterable[list[str]],
    sources: Mapping[str, _Source],
    targets: Mapping[str, Tensor],
    problems: Problems,
) -> None:
    """Every parameter has a source; where several of its names have one, they are equal."""
    for names in tied_names:
        filled = [name for name in names if name in sources]
        if not filled:
            problems["missing"].append(f"{' = '.join(names)} {tuple(targets[names[0]].shape)}")
        elif not all(_equal(sources[filled[0]], sources[name]) for name in filled[1:]):
            problems["tied but stored with different values"].append(" = ".join(filled))


def _take(sources: list[_Source], dtype: torch.dtype | None, aligned: bool) -> Tensor:
    """The tensor that all of `sources` store: the file's own, or a copy.

    After a copy, the memory of the file's own is freed.
    """
    stored = sources[0].checkpoint.tensor(sources[0].stored)
    tensor = sources[0].tensor()
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    if aligned and tensor.nbytes >= LARGE and tensor.data_ptr() % ALIGNMENT:  # as in many hub files
        tensor = tensor.clone()
    if tensor.untyped_storage().data_ptr() != stored.untyped_storage().data_ptr():
        for source in sources:
            source.checkpoint.forget(source.stored)
    return tensor


def _equal(first: _Source, second: _Source) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    one, other = (source.tensor().reshape(-1).view(torch.uint8) for source in (first, second))
    return torch.equal(one, other)


def _raise_problems(module: nn.Module, checkpoint: Checkpoint, problems: Problems) -> None:
    counts = [f"{len(lines)} {kind}" for kind, lines in problems.items() if lines]
    if not counts:
        return
    heading = f"the tensors do not fit {type(module).__name__} ({', '.join(counts)})"
    report = [f"{checkpoint.path}: {heading}; check that the config belongs to these weights"]
    for kind, lines in problems.items():
        if lines:
            report.append(f"  {kind} ({PROBLEM_KINDS[kind]}):")
            report += [f"    {line}" for line in lines[:LINES_PER_KIND]]
        if len(lines) > LINES_PER_KIND:
            report.append(f"    … and {len(lines) - LINES_PER_KIND} more")
    raise NanoVLMError(*report)


def _renamed(stored: str, name: str) -> str:
    return name if stored == name else f"{stored} → {name}"


def _some(names: list[str]) -> str:
    """A few tensor names for a one-line message."""
    return ", ".join(names[:3]) + (f" … and {len(names) - 3} more" if len(names) > 3 else "")
