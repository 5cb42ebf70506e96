"""By which names the files of each family of published models call our tensors.

The tables read from left (the published name) to right (ours); `{}` stands for the block's number,
None marks a tensor that is not used. `translate` applies a table, `invert` turns it round for
writing a published folder; VISION_FAMILIES and LANGUAGE_FAMILIES give the table of a model_type.

Lesson: lessons/source/12_weights.py.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor

from nanovlm.errors import NanoVLMError


@dataclass(frozen=True)
class Split:
    """Several of our tensors that are published as one, stacked along the first dimension.

    With `groups`, the published tensor has that many equal parts, such as one a head, and each of
    them stacks a slice of every one of `names`.
    """

    names: tuple[str, ...]
    groups: int = 1

    def piece(self, tensor: Tensor, index: int) -> Tensor:
        """(groups · n · rows, …) → (groups · rows, …), those of `names[index]`.

        A view where there is one group.
        """
        return tensor.unflatten(0, (self.groups, len(self.names), -1))[:, index].flatten(0, 1)

    def piece_shape(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """The shape of each piece of a tensor of `shape`; None where it cannot be split so."""
        if not shape or shape[0] % (self.groups * len(self.names)):
            return None
        return shape[0] // len(self.names), *shape[1:]


@dataclass(frozen=True)
class Unsqueezed(Split):
    """One of our tensors that is published without its first `ones` dimensions of size 1."""

    ones: int = 1

    def piece(self, tensor: Tensor, index: int) -> Tensor:
        """A view with the dimensions of size 1 in front."""
        return tensor.reshape(self.piece_shape(tuple(tensor.shape)))

    def piece_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (1,) * self.ones + shape


Target = str | Split | None
NameTable = Mapping[str, Target]

# First parts of our tensors' names before version 0.2, and now.
RENAMED_PARTS = {"vision.": "vision_encoder.", "decoder.": "language_model."}


def refuse_old_names(names: Iterable[str], where: str | Path) -> None:
    """Refuse a file of ours, of which `names` are the tensors, that was written before version 0.2.

    A file of a published model may use such names for its own tensors and is not for this check.
    """
    for name in names:
        for old, new in RENAMED_PARTS.items():
            if name.startswith(old):
                raise NanoVLMError(
                    f"{where}: tensor {name!r} is now {name.replace(old, new, 1)!r}; the file was "
                    "saved before version 0.2: rename its tensors, or train again"
                )


def translate(table: NameTable) -> Callable[[str], Target]:
    """The function from a published name to ours.

    A name that the table lacks comes back unchanged, to be reported.
    """

    def ours(name: str) -> Target:
        block = re.search(r"\.(\d+)\.", name)
        pattern = name if block is None else name.replace(block[0], ".{}.", 1)
        if pattern not in table:
            return name
        target = table[pattern]
        return target if block is None else renamed(target, lambda name: name.format(block[1]))

    return ours


def invert(table: NameTable) -> dict[str, str]:
    """The table from our names to published ones; where several exist, the first.

    Not for families that publish several of our tensors as one.
    """
    inverse = {}
    for theirs, target in reversed(list(table.items())):
        if isinstance(target, Unsqueezed):
            target = target.names[0]
        if isinstance(target, str):
            inverse[target] = theirs
    return inverse


def _with_bias(table: Mapping[str, Target], separator: str = ".") -> dict[str, Target]:
    """`table`, each of whose lines stands for a weight and a bias."""
    return {
        f"{theirs}{separator}{kind}": renamed(ours, ("{}." + kind).format)
        for theirs, ours in table.items()
        for kind in ("weight", "bias")
    }


def renamed(target: Target, rename: Callable[[str], str]) -> Target:
    """`target` with all its names changed."""
    if isinstance(target, Split):
        return replace(target, names=tuple(map(rename, target.names)))
    return target if target is None else rename(target)


DINOV2: NameTable = {
    "embeddings.cls_token": "cls_token",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.mask_token": None,  # takes the place of masked patches in DINOv2's own training
    "embeddings.position_embeddings": "position_embedding",
    "encoder.layer.{}.layer_scale1.lambda1": "blocks.{}.attention_scale",
    "encoder.layer.{}.layer_scale2.lambda1": "blocks.{}.mlp_scale",
    **_with_bias(
        {
            "embeddings.patch_embeddings.projection": "patch_embedding",
            "encoder.layer.{}.norm1": "blocks.{}.attention_norm",
            "encoder.layer.{}.attention.attention.query": "blocks.{}.attention.q_proj",
            "encoder.layer.{}.attention.attention.key": "blocks.{}.attention.k_proj",
            "encoder.layer.{}.attention.attention.value": "blocks.{}.attention.v_proj",
            "encoder.layer.{}.attention.output.dense": "blocks.{}.attention.out_proj",
            "encoder.layer.{}.norm2": "blocks.{}.mlp_norm",
            "encoder.layer.{}.mlp.fc1": "blocks.{}.mlp.up_proj",
            "encoder.layer.{}.mlp.fc2": "blocks.{}.mlp.down_proj",
            # The giant's names for the same two.
            "encoder.layer.{}.mlp.weights_in": "blocks.{}.mlp.up_proj",
            "encoder.layer.{}.mlp.weights_out": "blocks.{}.mlp.down_proj",
            "layernorm": "norm",
        }
    ),
}

SIGLIP: NameTable = {  # and SmolVLM2's vision encoder
    "embeddings.position_embedding.weight": Unsqueezed(("position_embedding",)),
    "embeddings.position_ids": None,  # 0, 1, 2, …, in older files
    **_with_bias(
        {
            "embeddings.patch_embedding": "patch_embedding",
            "encoder.layers.{}.layer_norm1": "blocks.{}.attention_norm",
            "encoder.layers.{}.self_attn.q_proj": "blocks.{}.attention.q_proj",
            "encoder.layers.{}.self_attn.k_proj": "blocks.{}.attention.k_proj",
            "encoder.layers.{}.self_attn.v_proj": "blocks.{}.attention.v_proj",
            "encoder.layers.{}.self_attn.out_proj": "blocks.{}.attention.out_proj",
            "encoder.layers.{}.layer_norm2": "blocks.{}.mlp_norm",
            "encoder.layers.{}.mlp.fc1": "blocks.{}.mlp.up_proj",
            "encoder.layers.{}.mlp.fc2": "blocks.{}.mlp.down_proj",
            "post_layernorm": "norm",
        }
    ),
}

CLIP: NameTable = SIGLIP | {
    "embeddings.class_embedding": Unsqueezed(("cls_token",), ones=2),
    **_with_bias(
        {
            "pre_layrnorm": "embedding_norm",  # spelt so in every published file
            "post_layernorm": None,  # applied to the class token alone, for comparison with texts
        }
    ),
}


def qwen_vl_vision(num_attention_heads: int) -> NameTable:
    """The table of Qwen-VL's vision encoder.

    In its blocks, one matrix holds queries, keys and values, with the three of a head side by side.
    """

    def projections(path: str, groups: int = 1) -> Split:
        return Split(tuple(f"{path}.{letter}_proj" for letter in "qkv"), groups)

    return {
        "positional_embedding": Unsqueezed(("position_embedding",)),
        "conv1.weight": "patch_embedding.weight",
        **_with_bias(
            {
                "ln_pre": "embedding_norm",
                "transformer.resblocks.{}.ln_1": "blocks.{}.attention_norm",
                "transformer.resblocks.{}.attn.in_proj": projections(
                    "blocks.{}.attention", num_attention_heads
                ),
                "transformer.resblocks.{}.attn.out_proj": "blocks.{}.attention.out_proj",
                "transformer.resblocks.{}.ln_2": "blocks.{}.mlp_norm",
                "transformer.resblocks.{}.mlp.c_fc": "blocks.{}.mlp.up_proj",
                "transformer.resblocks.{}.mlp.c_proj": "blocks.{}.mlp.down_proj",
                "attn_pool.ln_q": "resampler.query_norm",
                "attn_pool.ln_kv": "resampler.kv_norm",
                "attn_pool.attn.out_proj": "resampler.attention.out_proj",
                "ln_post": "resampler.norm",
            }
        ),
        **_with_bias({"attn_pool.attn.in_proj": projections("resampler.attention")}, separator="_"),
        "attn_pool.query": "resampler.queries",
        "attn_pool.pos_embed": None,  # sines and cosines, which are computed here
        "attn_pool.kv_proj.weight": "resampler.kv_proj.weight",
        "proj": "resampler.projection",
    }


QWEN: NameTable = {
    "model.embed_tokens.weight": "embed_tokens.weight",
    "model.layers.{}.input_layernorm.weight": "blocks.{}.attention_norm.weight",
    "model.layers.{}.self_attn.q_norm.weight": "blocks.{}.attention.q_norm.weight",
    "model.layers.{}.self_attn.k_norm.weight": "blocks.{}.attention.k_norm.weight",
    **_with_bias(
        {
            "model.layers.{}.self_attn.q_proj": "blocks.{}.attention.q_proj",
            "model.layers.{}.self_attn.k_proj": "blocks.{}.attention.k_proj",
            "model.layers.{}.self_attn.v_proj": "blocks.{}.attention.v_proj",
        }
    ),
    "model.layers.{}.self_attn.o_proj.weight": "blocks.{}.attention.out_proj.weight",
    "model.layers.{}.post_attention_layernorm.weight": "blocks.{}.mlp_norm.weight",
    "model.layers.{}.mlp.gate_proj.weight": "blocks.{}.mlp.gate_proj.weight",
    "model.layers.{}.mlp.up_proj.weight": "blocks.{}.mlp.up_proj.weight",
    "model.layers.{}.mlp.down_proj.weight": "blocks.{}.mlp.down_proj.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "lm_head.weight",
}

LLAMA: NameTable = {  # QWEN's names, which LLaMA had first, and biases that some have
    **QWEN,
    "model.layers.{}.self_attn.o_proj.bias": "blocks.{}.attention.out_proj.bias",
    **{
        f"model.layers.{{}}.mlp.{name}.bias": f"blocks.{{}}.mlp.{name}.bias"
        for name in ("gate_proj", "up_proj", "down_proj")
    },
    # In older files: the rotary frequencies, which are computed here.
    "model.layers.{}.self_attn.rotary_emb.inv_freq": None,
}

# Qwen's first generation: one matrix holds queries, keys and values, and `w2` is the MLP's gate.
QWEN1: NameTable = {
    "transformer.wte.weight": "embed_tokens.weight",
    "transformer.h.{}.ln_1.weight": "blocks.{}.attention_norm.weight",
    **{
        f"transformer.h.{{}}.attn.c_attn.{kind}": Split(
            tuple(f"blocks.{{}}.attention.{name}.{kind}" for name in ("q_proj", "k_proj", "v_proj"))
        )
        for kind in ("weight", "bias")
    },
    "transformer.h.{}.attn.c_proj.weight": "blocks.{}.attention.out_proj.weight",
    "transformer.h.{}.ln_2.weight": "blocks.{}.mlp_norm.weight",
    "transformer.h.{}.mlp.w1.weight": "blocks.{}.mlp.up_proj.weight",
    "transformer.h.{}.mlp.w2.weight": "blocks.{}.mlp.gate_proj.weight",
    "transformer.h.{}.mlp.c_proj.weight": "blocks.{}.mlp.down_proj.weight",
    "transformer.ln_f.weight": "norm.weight",
    "lm_head.weight": "lm_head.weight",
    "transformer.rotary_emb.inv_freq": None,
    "transformer.h.{}.attn.rotary_emb.inv_freq": None,
}


@dataclass(frozen=True)
class Family:
    """How the files of a family name our tensors.

    table: from their names to ours, or a function of the model's config that returns it.
    prefix: a pattern of what may precede a name; it depends on the class that saved the file.
    unused: shell-style patterns of names, without prefix, of other parts of the published model.
    written: the prefix that a name gets when a whole model is written.
    """

    table: NameTable | Callable[[Any], NameTable]
    prefix: str = ""
    unused: tuple[str, ...] = ()
    written: str = ""

    def names(self, config: Any) -> Callable[[str], Target]:
        """The function from a published name to ours, for a model of shape `config`."""
        ours = translate(self.table(config) if callable(self.table) else self.table)
        prefix = re.compile(rf"\A(?:{self.prefix})")

        def name_map(name: str) -> Target:
            name = prefix.sub("", name, count=1)
            unused = any(fnmatchcase(name, pattern) for pattern in self.unused)
            return None if unused else ours(name)

        return name_map

    def published_names(self) -> Callable[[str], str]:
        """The function from our name to the one that a whole model is written with.

        Only for families with one table (`invert`).
        """
        assert not callable(self.table)
        theirs = translate(invert(self.table))
        return lambda name: f"{self.written}{theirs(name)}"


_VISION_PREFIX = {"prefix": r"(vision_model\.)?", "written": "vision_model."}
_SIGLIP = Family(
    SIGLIP, **_VISION_PREFIX, unused=("head.*", "text_model.*", "logit_scale", "logit_bias")
)
_CLIP = Family(
    CLIP,
    **_VISION_PREFIX,
    unused=("text_model.*", "text_projection.*", "visual_projection.*", "logit_scale"),
)
_SMOLVLM = Family(
    SIGLIP,
    prefix=r"(model\.vision_model\.)?",
    unused=("model.text_model.*", "model.connector.*", "lm_head.*"),
)
_QWEN_VL = Family(
    lambda config: qwen_vl_vision(config.num_attention_heads), prefix=r"(transformer\.visual\.)?"
)

OWN = "nanovlm_language_model"  # the model_type that `save_language_model` writes
OWN_BEFORE = "nanovlm_decoder"  # the same before version 0.2

# By the model_type of `config.json`.
VISION_FAMILIES = {
    "dinov2": Family(DINOV2),
    "dinov2_with_registers": Family(DINOV2),
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "smolvlm": _SMOLVLM,
    "smolvlm_vision": _SMOLVLM,
    "idefics3": _SMOLVLM,
    "idefics3_vision": _SMOLVLM,
    "qwen_vl_vision": _QWEN_VL,
}
LANGUAGE_FAMILIES = {
    "qwen": Family(QWEN1),
    "qwen2": Family(QWEN),
    "qwen3": Family(QWEN),
    "llama": Family(LLAMA),
    "mistral": Family(LLAMA),
    OWN: Family({}),  # under our own names
}
