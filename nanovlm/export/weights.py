"""The tensors of a model under published names, in files of a chosen size."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nanovlm.errors import NanoVLMError
from nanovlm.export.families import Form
from nanovlm.hub.adapters import merged_tensors
from nanovlm.hub.loading import INDEX_FILE, SINGLE_FILE
from nanovlm.hub.names import VISION_FAMILIES, Unsqueezed
from nanovlm.hub.published.families import PUBLISHED
from nanovlm.hub.safetensors import Deferred, save_file
from nanovlm.model.layers import resize_positions
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.utils.files import write_json

Tensors = dict[str, Deferred]


def published_tensors(model: VisionLanguageModel, form: Form, dtype: torch.dtype) -> Tensors:
    """All tensors of the published model by name; each is made when it is written."""
    tensors = merged_tensors(model, dtype)
    _fit_projector(tensors, model, dtype)
    _fit_positions(tensors, model, form)
    _fit_vocabulary(tensors, form)
    family = PUBLISHED[form.family]
    parts = family.parse(form.config)
    theirs, ours = family.published_names(parts), family.name_map(parts)
    published: Tensors = {}
    for name, tensor in tensors.items():
        target = ours(theirs(name))
        if isinstance(target, Unsqueezed):
            assert target.names == (name,)
            shape = tensor.shape[target.ones :]
            tensor = Deferred(shape, dtype, partial(_reshaped, tensor.make, shape))
        else:
            assert target == name, (name, target)
        published[theirs(name)] = _checked(theirs(name), tensor)
    width = parts.vision_encoder.hidden_size
    return published | _unused_tensors(parts.vision_type, theirs, width, dtype)


def _fit_projector(tensors: Tensors, model: VisionLanguageModel, dtype: torch.dtype) -> None:
    """One matrix becomes the two of LLaVA, of which the second changes nothing."""
    if model.config.projector.kind != "linear":
        return
    width = model.config.language_model.input_size
    for kind in ("weight", "bias"):
        if (tensor := tensors.pop(f"projector.linear.{kind}", None)) is not None:
            tensors[f"projector.up.{kind}"] = tensor
    tensors["projector.down.weight"] = Deferred((width, width), dtype, partial(torch.eye, width))
    if "projector.up.bias" in tensors:
        tensors["projector.down.bias"] = Deferred((width,), dtype, partial(torch.zeros, width))


def _fit_positions(tensors: Tensors, model: VisionLanguageModel, form: Form) -> None:
    """Resize the position table as the vision encoder does for each image, once."""
    name, encoder = "vision_encoder.position_embedding", model.vision_encoder
    table, config = tensors[name], model.config.vision_encoder
    side = form.config["vision_config"]["image_size"] // config.patch_size
    if side == encoder.side:
        return

    def make() -> Tensor:
        rest, grid = table.make().tensor_split([-(encoder.side**2)], dim=1)
        grid = resize_positions(grid, encoder.side, side, side, config.position_resize)
        return torch.cat((rest, grid), dim=1)

    shape = (1, table.shape[1] - encoder.side**2 + side**2, table.shape[2])
    tensors[name] = Deferred(shape, table.dtype, make)


def _fit_vocabulary(tensors: Tensors, form: Form) -> None:
    """Rows of zeros for a placeholder that has none: LLaVA looks it up before it is replaced."""
    rows = form.config["text_config"]["vocab_size"]
    for name in ("language_model.embed_tokens.weight", "language_model.lm_head.weight"):
        tensor = tensors.get(name)
        if tensor is not None and tensor.shape[0] < rows:
            shape = (rows, *tensor.shape[1:])
            tensors[name] = Deferred(shape, tensor.dtype, partial(_with_rows, tensor.make, rows))


def _with_rows(make: Callable[[], Tensor], rows: int) -> Tensor:
    tensor = make()
    return torch.cat((tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])))


def _reshaped(make: Callable[[], Tensor], shape: tuple[int, ...]) -> Tensor:
    return make().reshape(shape)


def _checked(name: str, tensor: Deferred) -> Deferred:
    """The tensor, refused when it is made if `dtype` cannot hold its values."""

    def make() -> Tensor:
        values = tensor.make().detach()
        cast = values.to(tensor.dtype)
        if not _is_finite(cast):
            kind = str(tensor.dtype).removeprefix("torch.")
            advice = "take --dtype bfloat16" if _is_finite(values) else "train again"
            raise NanoVLMError(f"{name}: holds values that are no numbers in {kind}; {advice}")
        return cast

    return Deferred(tensor.shape, tensor.dtype, make)


def _is_finite(values: Tensor) -> bool:
    """Whether all are numbers; unlike `isfinite`, this takes no memory."""
    return all(bool(it.isfinite()) for it in values.aminmax())


def _unused_tensors(
    vision_type: str, theirs: Callable[[str], str], width: int, dtype: torch.dtype
) -> Tensors:
    """Tensors that the class in `transformers` has and that do not take part in an answer.

    CLIP's last norm is for its class token, DINOv2's mask token for its training.
    """
    prefix = theirs("vision_encoder.patch_embedding.weight").partition("embeddings.")[0]
    table = VISION_FAMILIES[vision_type].table
    assert not callable(table)
    made = {
        "post_layernorm.weight": Deferred((width,), dtype, partial(torch.ones, width)),
        "post_layernorm.bias": Deferred((width,), dtype, partial(torch.zeros, width)),
        "embeddings.mask_token": Deferred((1, width), dtype, partial(torch.zeros, 1, width)),
    }
    return {
        f"{prefix}{name}": tensor for name, tensor in made.items() if table.get(name, name) is None
    }


def write_weights(tensors: Tensors, folder: Path, shard_size: int) -> int:
    """Write the tensors to files of at most `shard_size` bytes each; returns how many there are.

    A tensor that is larger gets a file of its own. Several files have an index.
    """
    shards = list(_shards(tensors, shard_size))
    if len(shards) == 1:
        save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
        return 1
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        save_file({name: tensors[name] for name in names}, folder / file, {"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return len(shards)


def _shards(tensors: Tensors, shard_size: int) -> Iterator[list[str]]:
    names, size = [], 0
    for name, tensor in tensors.items():
        if names and size + tensor.nbytes > shard_size:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.nbytes
    yield names
