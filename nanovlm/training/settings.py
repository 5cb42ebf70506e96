"""Every setting of a training run, in groups; where their values come from is in `presets.py`."""

import dataclasses
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from nanovlm.errors import MAX_QUOTED, NanoVLMError, quoted
from nanovlm.utils.config import RENAMED_VALUES, check_number
from nanovlm.utils.device import DEVICES, DTYPES
from nanovlm.utils.parser import expand_user, flag

PARTS = ("projector", "language_model", "vision_encoder")  # of VisionLanguageModel
# Settings outside the group "run" that may change when a run is resumed, since they do not change
# its result. The training loop checks that processes × batch size × accumulate stay the same.
FREE_TO_CHANGE = ("workers", "device", "parallel", "compile", "batch_size", "accumulate")
PATHS = ("data", "val", "images", "init", "vision_encoder", "language_model", "out")
ASSETS_MARK = "{assets}"  # in a file of settings, the folder of what ships


class Limit(NamedTuple):
    """The values that a setting may have, as a condition and in words."""

    holds: Callable[[Any], bool]
    request: str


# Of all numbers, `check_numbers` refuses what is not finite, too large, negative, and 0 where the
# default is another number.
ANY = Limit(lambda value: True, "")
FROM_0 = Limit(lambda value: value >= 0, "it has to be 0 or more")
BELOW_1 = Limit(lambda value: 0 <= value < 1, "it has to be 0 or more and below 1")
BELOW_HALF = Limit(lambda value: 0 <= value < 0.5, "it has to be 0 or more and below 0.5")
AUTO_OR_FROM_0 = Limit(
    lambda value: value == "auto" if isinstance(value, str) else type(value) is int and value >= 0,
    "it has to be auto, or a whole number from 0 on",
)
AUTO_OR_BOOL = Limit(
    lambda value: value == "auto" or isinstance(value, bool), "take true, false or auto"
)


def setting(default: Any, help: str, limit: Limit = ANY) -> Any:
    """A field of a group: its default, what `--help` says about it, and the values it may have."""
    return field(default=default, metadata={"help": help, "limit": limit})


def choice(help: str, *choices: str) -> Any:
    """A field with one of a few words; the first is the default."""
    named = ", ".join(word or "nothing" for word in choices)
    limit = Limit(lambda value: value in choices, f"take one of {named}")
    return setting(choices[0], f"{help}: {', '.join(filter(None, choices))}", limit)


@dataclass(frozen=True)
class DataSettings:
    """Records, and the batches that are made of them."""

    data: str = setting("", "training records: .json or .jsonl files, with commas, or a pattern")
    images: str = setting("", "folder of relative image paths (default: the records' folder)")
    val: str = setting("", "records for validation (default: --val-fraction of the images)")
    val_fraction: float = setting(0.02, "share of the images held out without --val", BELOW_1)
    val_samples: int = setting(256, "validation records used at most")
    share: int = setting(8, "samples of one image in a sequence, which encodes it once")
    max_length: int = setting(2048, "tokens of a sample; longer text is cut at the end")
    workers: int | str = setting(
        "auto",
        "processes that prepare batches in advance (0: none; auto: on CUDA up to 8, else none)",
        AUTO_OR_FROM_0,
    )
    cache_features: bool = setting(False, "encode each image once (frozen vision encoder only)")
    pack: int = setting(0, "tokens of a packed sequence of several samples (0: no packing)")
    bucket: int = setting(1, "batches that are sorted by length, or packed, together")


@dataclass(frozen=True)
class ModelSettings:
    """The model that a run starts from."""

    init: str = setting("", "model folder to start from, such as the one of stage 1")
    vision_encoder: str = setting("", "folder of DINOv2, SigLIP, CLIP, SmolVLM2 or Qwen-VL")
    language_model: str = setting("", "folder of Qwen (to Qwen3), LLaMA, SmolLM2 or Mistral")
    language_model_shape: str = setting(
        "", "published shape to train from scratch, with --language-model's tokenizer"
    )
    projector: str = setting("mlp", "linear, mlp, pixel_shuffle, bilinear or resampler")
    projector_activation: str = setting(
        "gelu", "in mlp, bilinear and resampler: silu, gelu, gelu_pytorch_tanh or quick_gelu"
    )
    projector_bias: bool = setting(True, "bias of the projector's matrices (not the resampler's)")
    grid: int = setting(8, "side of the grid that the bilinear projector makes")
    scale: int = setting(2, "side of the squares that pixel_shuffle merges")
    num_queries: int = setting(32, "visual tokens per image of the resampler projector")
    image_size: int = setting(0, "side of an image, or tile, in pixels (0: the encoder's)")
    tiles: int = setting(0, "most tiles along a side of an image (0: the encoder's, 1: not cut)")
    vision_layer: int = setting(-1, "encoder layer to use: -1 is the last, -2 the one before it")
    vision_norm: bool = setting(True, "encoder's final norm after that layer (-1 only)")
    bidirectional_images: bool = setting(
        False, "visual tokens of an image attend to each other in both directions"
    )
    system: str = setting("", "system prompt of conversations that have none")
    tiny: bool = setting(False, "the preset at toy widths, random weights and toy data, to try it")


@dataclass(frozen=True)
class TrainableSettings:
    """Which parameters are trained; the others are frozen."""

    train: str = setting("projector", f"parts to train, with commas: {', '.join(PARTS)}")
    language_model_layers: int = setting(0, "train only the last N of its blocks (0: all)")
    language_model_embedding: bool = setting(False, "also train the word embeddings")
    vision_encoder_layers: int = setting(0, "train only the last N of its blocks (0: all)")
    lora_rank: int = setting(0, "rank of LoRA adapters of the language model (0: none)")
    lora_alpha: float = setting(0.0, "scale of LoRA times its rank (0: twice the rank)")
    lora_dropout: float = setting(0.0, "dropout on the inputs of LoRA adapters", BELOW_1)
    lora_targets: str = setting("*_proj", "layers to adapt, with commas: ends of names or patterns")

    @property
    def trained_parts(self) -> tuple[str, ...]:
        """The parts that `train` names."""
        return tuple(part.strip() for part in self.train.split(",") if part.strip())


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW, and the learning rate of each part."""

    lr: float = setting(1e-3, "peak learning rate")
    lr_projector: float = setting(0.0, "learning rate of the projector (0: --lr)")
    lr_language_model: float = setting(0.0, "learning rate of the language model (0: --lr)")
    lr_vision_encoder: float = setting(0.0, "learning rate of the vision encoder (0: --lr)")
    layer_decay: float = setting(1.0, "factor on the rate per block away from the output")
    warmup: float = setting(0.03, "share of the steps that the linear warm-up takes")
    min_lr: float = setting(0.1, "share of the peak at the end of the cosine")
    weight_decay: float = setting(0.0, "weight decay of matrices; norms and biases have none")
    beta2: float = setting(0.95, "decay of AdamW's second moment; its first has 0.9", BELOW_1)
    clip: float = setting(1.0, "largest gradient norm")
    optimizer: str = choice("AdamW, or with moments in 8 bits", "adamw", "adamw8bit")
    stochastic_rounding: bool = setting(
        False, "keep trainable parameters in bf16, stochastically rounded, without an fp32 copy"
    )

    def peak_lr(self, part: str) -> float:
        """The learning rate of `part` at the top of the schedule."""
        return getattr(self, f"lr_{part}") or self.lr


@dataclass(frozen=True)
class StepSettings:
    """How many steps a run takes, and of how many records."""

    epochs: float = setting(1.0, "passes over the data")
    max_steps: int = setting(0, "optimizer steps, in place of --epochs")
    batch_size: int = setting(32, "records of a forward pass")
    accumulate: int = setting(1, "forward passes of an optimizer step")
    max_bad_steps: int = setting(5, "bad steps in a row (not finite) that end the run")


@dataclass(frozen=True)
class ObjectiveSettings:
    """The loss: of answers, of pairs of them (preference training), or of their words alone."""

    objective: str = choice(
        "answers, of two answers the preferred one, or the words of an image's answers",
        "sft",
        "dpo",
        "words",
    )
    beta: float = setting(0.1, "dpo: how strongly it is held to the reference model")
    label_smoothing: float = setting(0.0, "dpo: probability that labels are swapped", BELOW_HALF)
    sft_weight: float = setting(0.0, "dpo: weight of the chosen answer's cross entropy")
    word_images: int = setting(5, "words: images that a word occurs in at least")
    max_words: int = setting(4000, "words: how many are learned at most, the most frequent ones")


@dataclass(frozen=True)
class MachineSettings:
    """The hardware a run computes on, and how it saves memory there."""

    device: str = choice("device to train on", "auto", *DEVICES)
    dtype: str = choice("compute dtype", "auto", *DTYPES)
    compile: bool | str = setting(
        "auto", "compile the blocks with torch.compile (default: on CUDA if it works)", AUTO_OR_BOOL
    )
    deterministic: bool = setting(
        False, "take only operations that give the same bits in every run, on CUDA as well"
    )
    checkpointing: bool = setting(False, "recompute activations in the backward pass")
    quantize: str = choice("matrices of the frozen language model in few bits", "", "nf4", "int8")
    parallel: str = choice("how the processes of torchrun share the work", "ddp", "fsdp")
    seed: int = setting(0, "random seed of new weights, the data's order and dropout", FROM_0)


@dataclass(frozen=True)
class RunSettings:
    """What is written to the run folder; changes nothing that is trained."""

    out: str = setting("runs/run", "folder of the run")
    log_every: int = setting(10, "steps between lines of metrics.jsonl")
    val_every: int = setting(0, "steps between validations (0: at the end only)")
    save_every: int = setting(500, "steps between checkpoints")
    keep: int = setting(3, "newest checkpoints to keep, besides the best")
    full_disk: str = choice("what to do if a checkpoint finds no room", "stop", "go-on")
    track: str = choice("service to log to as well", "", "tensorboard", "wandb", "swanlab")
    resume: bool = setting(False, "continue the run in --out from its last checkpoint")
    allow_changes: bool = setting(False, "resume with settings that change the result")


GROUPS = {  # as `--help` shows them
    "data": DataSettings,
    "model": ModelSettings,
    "trainable parameters": TrainableSettings,
    "optimizer": OptimizerSettings,
    "steps": StepSettings,
    "objective": ObjectiveSettings,
    "machine": MachineSettings,
    "run": RunSettings,
}


@dataclass(frozen=True)
class Settings(
    RunSettings,
    MachineSettings,
    ObjectiveSettings,
    StepSettings,
    OptimizerSettings,
    TrainableSettings,
    ModelSettings,
    DataSettings,  # dataclasses begin with the fields of the last base
):
    """One training run: all groups together, so it can be passed where one of them is expected.

    Each field is a flag of `train_stage1.py` and `train_stage2.py` and a key of a preset's stage.
    """

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, str):
                object.__setattr__(self, name, _checked_text(name, value))
        for name in ("dtype", "train"):
            for value in map(str.strip, getattr(self, name).split(",")):
                if new := RENAMED_VALUES.get(value):
                    raise NanoVLMError(f"{flag(name)} {value} is now {flag(name)} {new}")
        for checked in dataclasses.fields(self):
            value, limit = getattr(self, checked.name), checked.metadata["limit"]
            if not limit.holds(value):
                raise NanoVLMError(f"{flag(checked.name)} is {quoted(value)}; {limit.request}")
            check_number(checked.name, value, flag(checked.name), checked.default)
        unknown = set(self.trained_parts) - set(PARTS)
        if unknown or not self.trained_parts:
            raise NanoVLMError(
                f"--train names {', '.join(sorted(unknown))[:MAX_QUOTED] or 'no part'}; "
                "parts are projector, language_model and vision_encoder"
            )
        if self.lora_rank and "language_model" not in self.trained_parts:
            raise NanoVLMError(
                f"--lora-rank {self.lora_rank} adapts the language model, "
                "but --train does not name language_model; add it"
            )
        if self.quantize and "language_model" in self.trained_parts and not self.lora_rank:
            raise NanoVLMError(
                f"--quantize {self.quantize} freezes the language model, "
                "and --train names language_model; add --lora-rank, or take language_model out"
            )
        if self.objective == "words":
            _check_words(self)


def _check_words(settings: Settings) -> None:
    """Refuse what has no meaning where only the words of images are learned."""
    parts = settings.trained_parts
    if "projector" not in parts or "language_model" in parts:
        raise NanoVLMError(
            f"--objective words trains the projector without running the language model, and "
            f"--train is {settings.train}; take projector, or projector,vision_encoder"
        )
    if settings.language_model_embedding:
        raise NanoVLMError(
            "--objective words learns towards the word embeddings and leaves them as they are; "
            "take --no-language-model-embedding"
        )
    if settings.pack:
        raise NanoVLMError(
            f"--pack {settings.pack} packs text and --objective words reads none; leave it out"
        )
    if settings.parallel == "fsdp":
        raise NanoVLMError(
            "--parallel fsdp shares out a model that runs as a whole and --objective words runs a "
            "part of it; take --parallel ddp"
        )


def deciding(settings: Settings) -> dict[str, Any]:
    """The settings that decide the result of a run."""
    free = {each.name for each in dataclasses.fields(RunSettings)} | {*FREE_TO_CHANGE}
    return {name: value for name, value in vars(settings).items() if name not in free}


def _checked_text(name: str, text: str) -> str:
    """The text of a setting as a file of settings can hold it; in paths without `~`."""
    if name in PATHS:
        text = expand_user(text)
        if "\0" in text:
            raise NanoVLMError(f"{flag(name)} is {quoted(text)}; no path has a NUL in it")
    if re.search("[\ud800-\udfff]", text):
        raise NanoVLMError(
            f"{flag(name)} is {quoted(text)}, which is no UTF-8 text; give it another name"
        )
    return text


def to_toml(settings: Settings) -> str:
    """The resolved settings as a file that `--config` reads back to the same ones.

    `json` and TOML spell values alike, but for DEL, which TOML wants escaped. ASSETS_MARK is
    escaped, too, since it means itself here.
    """
    text = "".join(
        f"{name} = {json.dumps(value, ensure_ascii=False)}\n"
        for name, value in dataclasses.asdict(settings).items()
    )
    return text.replace("\x7f", "\\u007f").replace(ASSETS_MARK, f"\\u007b{ASSETS_MARK[1:]}")
