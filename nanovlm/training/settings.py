"""Every setting of a training run, and where its value comes from: preset or file, then flags."""

import argparse
import dataclasses
import json
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanovlm.errors import NanoVLMError
from nanovlm.hub.toy import ASSETS, TOY_LAYERS
from nanovlm.utils.config import from_dict, unknown_key
from nanovlm.utils.parser import CommandParser

PRESETS = Path(__file__).parents[1] / "presets"
TOY_PAIRS = "data/scenes/pairs.jsonl"  # of the toy world, made by data_tools/make_preferences.py
STAGES = ("stage1", "stage2")  # those that the two scripts train; a preset may have more
# A setting that was chosen for another one's value falls away when that one is given anew.
CHOSEN_FOR = {
    "lr": ("lr_projector", "lr_language_model", "lr_vision_encoder"),
    "data": ("images", "val"),
}

CHOICES = {
    "device": ("auto", "cpu", "cuda", "mps"),
    "dtype": ("auto", "bfloat16", "float16", "float32"),
    "parallel": ("ddp", "fsdp"),
    "optimizer": ("adamw", "adamw8bit"),
    "quantize": ("", "nf4", "int8"),
    "full_disk": ("stop", "go-on"),
    "track": ("", "tensorboard", "wandb", "swanlab"),
    "objective": ("sft", "dpo"),
}
# Settings that may differ when a run is resumed, besides those of the group "run": they do not change what is learned. Of
# the batch, the loop checks that processes × batch size × accumulate stay what they were.
FREE_TO_CHANGE = ("workers", "device", "parallel", "compile", "batch_size", "accumulate")


def _setting(default: Any, group: str, help: str) -> Any:
    return field(default=default, metadata={"group": group, "help": help})


@dataclass(frozen=True)
class Settings:
    """One training run. Each field is a flag of `train_stage1.py` and `train_stage2.py` and a key of a preset's stage."""

    data: str = _setting(
        "",
        "data",
        "records to learn from: .json or .jsonl, several with commas, or a pattern in quotes",
    )
    images: str = _setting(
        "", "data", "folder that image paths are relative to (default: the records' folder)"
    )
    val: str = _setting(
        "",
        "data",
        "records for the validation loss (default: --val-fraction of the data, by image)",
    )
    val_fraction: float = _setting(
        0.02, "data", "share of the images held out where there is no --val"
    )
    val_samples: int = _setting(256, "data", "records of it that are used at most")
    share: int = _setting(
        8, "data", "samples of one image that may share a row, so that the image is read once"
    )
    max_length: int = _setting(
        2048, "data", "tokens a sample may have; longer text is cut at the end and counted"
    )
    workers: int = _setting(0, "data", "processes that prepare batches ahead of the step (0: none)")
    cache_features: bool = _setting(
        False, "data", "encode each image once and keep its features (frozen eyes only)"
    )
    pack: int = _setting(
        0,
        "data",
        "tokens of a row that several samples share, each seeing only itself (0: no packing)",
    )
    bucket: int = _setting(
        1, "data", "batches read together, so that they can be sorted by length or packed tighter"
    )

    init: str = _setting("", "model", "model folder to start from, such as stage 1's")
    vision_encoder: str = _setting(
        "",
        "model",
        "pretrained eyes to start from: a folder of DINOv2, SigLIP, CLIP, SmolVLM2 or Qwen-VL",
    )
    language_model: str = _setting(
        "",
        "model",
        "pretrained voice to start from: a folder of Qwen (to Qwen3), LLaMA, SmolLM2 or Mistral",
    )
    language_model_shape: str = _setting(
        "",
        "model",
        "published shape of a decoder that starts from nothing; --language-model then gives its "
        "tokenizer only",
    )
    projector: str = _setting("mlp", "model", "linear, mlp, pixel_shuffle, bilinear or resampler")
    projector_activation: str = _setting(
        "gelu",
        "model",
        "between the layers of the mlp, bilinear and resampler "
        "projectors: silu, gelu, gelu_pytorch_tanh or quick_gelu",
    )
    projector_bias: bool = _setting(
        True, "model", "the matrix of the linear and pixel_shuffle projectors has a bias"
    )
    grid: int = _setting(8, "model", "side of the patch grid after the bilinear projector")
    scale: int = _setting(2, "model", "side of the squares that the pixel_shuffle projector merges")
    num_queries: int = _setting(
        32, "model", "visual tokens that the resampler projector makes of an image"
    )
    image_size: int = _setting(
        0, "model", "side in pixels an image, or a tile, is resized to (default: the eyes' own)"
    )
    tiles: int = _setting(
        0,
        "model",
        "tiles a side that an image is cut into at most, beside the whole (0: as the eyes' folder "
        "says, 1: not cut)",
    )
    vision_layer: int = _setting(
        -1, "model", "layer of the eyes that is looked at; -1 is after the final norm"
    )
    bidirectional_images: bool = _setting(
        False, "model", "visual tokens of an image see each other both ways"
    )
    system: str = _setting("", "model", "system prompt of conversations that bring none")
    tiny: bool = _setting(
        False,
        "model",
        "the preset at toy widths with random weights, on the toy world: to see it run",
    )

    train: str = _setting(
        "projector",
        "what learns",
        "parts that learn, with commas: projector, language_model, vision_encoder",
    )
    language_model_layers: int = _setting(
        0, "what learns", "top blocks of the decoder that learn (0: all of it, embeddings too)"
    )
    language_model_embedding: bool = _setting(
        False, "what learns", "the word embeddings and a reducer of them learn, whatever else does"
    )
    vision_encoder_layers: int = _setting(
        0, "what learns", "top blocks of the eyes that learn (0: all of the eyes)"
    )
    layer_decay: float = _setting(
        1.0, "what learns", "factor on the learning rate for each block further from the output"
    )
    lora_rank: int = _setting(
        0, "what learns", "rank of LoRA adapters that learn in the decoder's place (0: none)"
    )
    lora_alpha: float = _setting(
        0.0, "what learns", "LoRA's scale times its rank (0: twice the rank)"
    )
    lora_dropout: float = _setting(0.0, "what learns", "dropout on what LoRA adapters read")
    lora_targets: str = _setting(
        "*_proj",
        "what learns",
        "decoder layers that get adapters: ends or patterns (*) of names, with commas",
    )

    epochs: float = _setting(1.0, "training", "times the data is seen")
    max_steps: int = _setting(0, "training", "optimizer steps, in place of --epochs")
    batch_size: int = _setting(32, "training", "records a forward pass takes")
    accumulate: int = _setting(1, "training", "forward passes an optimizer step takes")
    lr: float = _setting(1e-3, "training", "peak learning rate")
    lr_projector: float = _setting(0.0, "training", "peak learning rate of the projector (0: --lr)")
    lr_language_model: float = _setting(
        0.0, "training", "peak learning rate of the decoder (0: --lr)"
    )
    lr_vision_encoder: float = _setting(0.0, "training", "peak learning rate of the eyes (0: --lr)")
    warmup: float = _setting(
        0.03, "training", "share of the steps over which the learning rate rises"
    )
    min_lr: float = _setting(0.1, "training", "share of the peak at which the cosine ends")
    weight_decay: float = _setting(0.0, "training", "of matrices; norms and biases have none")
    beta2: float = _setting(0.95, "training", "AdamW's second moment; its first is 0.9")
    clip: float = _setting(1.0, "training", "largest gradient norm")
    max_bad_steps: int = _setting(
        5, "training", "steps in a row without a finite loss and gradient after which the run stops"
    )

    objective: str = _setting(
        "sft",
        "preference",
        "sft: the answers of the records; dpo: of two answers the preferred one",
    )
    beta: float = _setting(
        0.1, "preference", "dpo: how much the model is held to what it was at the start"
    )
    label_smoothing: float = _setting(
        0.0, "preference", "dpo: probability that a pair's answers are the wrong way round"
    )
    sft_weight: float = _setting(
        0.0, "preference", "dpo: weight of the chosen answer's cross entropy per token, added"
    )

    optimizer: str = _setting("adamw", "memory", "adamw, or adamw8bit: moments in 8 bits")
    stochastic_rounding: bool = _setting(
        False, "memory", "keep what learns in bf16, rounded at random, without an fp32 copy"
    )
    quantize: str = _setting(
        "",
        "memory",
        "hold the frozen decoder's matrices as nf4 (4 bits) or int8; the model is saved with "
        "the values that they stand for",
    )
    checkpointing: bool = _setting(
        False, "memory", "keep one activation a block and compute the others again"
    )

    device: str = _setting("auto", "machine", "auto, cpu, cuda or mps")
    dtype: str = _setting("auto", "machine", "auto, bf16, fp16 or fp32")
    compile: bool = _setting(False, "machine", "compile the blocks with torch.compile")
    parallel: str = _setting(
        "ddp", "machine", "how several processes (torchrun) share the work: ddp or fsdp"
    )
    seed: int = _setting(0, "machine", "of the projector's first weights and the order of the data")

    out: str = _setting("runs/run", "run", "folder of the run")
    log_every: int = _setting(10, "run", "steps between lines of metrics.jsonl")
    val_every: int = _setting(
        0,
        "run",
        "steps between validations: loss, perplexity, watched answers (0: at the end only)",
    )
    save_every: int = _setting(500, "run", "steps between checkpoints")
    keep: int = _setting(
        3, "run", "newest checkpoints that are kept, besides the one of the best validation loss"
    )
    full_disk: str = _setting(
        "stop", "run", "when a checkpoint finds no room: stop, or go-on without it"
    )
    track: str = _setting("", "run", "also log to tensorboard, wandb or swanlab")
    resume: bool = _setting(False, "run", "continue the run in --out from its last checkpoint")
    allow_changes: bool = _setting(
        False, "run", "resume although settings that change the result were changed"
    )

    def __post_init__(self) -> None:
        positive = (
            "val_samples",
            "share",
            "max_length",
            "grid",
            "scale",
            "num_queries",
            "epochs",
            "batch_size",
            "accumulate",
            "lr",
            "clip",
            "log_every",
            "save_every",
            "keep",
            "bucket",
            "layer_decay",
            "max_bad_steps",
            "beta",
        )
        not_negative = (
            "workers",
            "max_steps",
            "lr_projector",
            "lr_language_model",
            "lr_vision_encoder",
            "weight_decay",
            "val_every",
            "image_size",
            "tiles",
            "seed",
            "pack",
            "language_model_layers",
            "vision_encoder_layers",
            "lora_rank",
            "lora_alpha",
            "sft_weight",
        )
        for names, fits, expected in (
            (positive, lambda value: 0 < value < math.inf, "a number above 0"),
            (not_negative, lambda value: 0 <= value < math.inf, "0 or more"),
            (("warmup", "min_lr"), lambda value: 0 <= value <= 1, "between 0 and 1"),
            (
                ("val_fraction", "beta2", "lora_dropout"),
                lambda value: 0 <= value < 1,
                "0 or more and below 1",
            ),
            (("label_smoothing",), lambda value: 0 <= value < 0.5, "0 or more and below 0.5"),
            (("seed",), lambda value: value < 2**63, "below 2 to the power of 63"),
        ):
            for name in names:
                if not fits(getattr(self, name)):
                    raise NanoVLMError(
                        f"--{name.replace('_', '-')} is {getattr(self, name)}; it has to be {expected}"
                    )
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                named = ", ".join(choice or "nothing" for choice in choices)
                raise NanoVLMError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)!r}; take one of {named}"
                )
        unknown = set(self.trained_parts) - {"projector", "language_model", "vision_encoder"}
        if unknown or not self.trained_parts:
            raise NanoVLMError(
                f"--train names {', '.join(sorted(unknown)) or 'no part'}; parts are projector, language_model and vision_encoder"
            )
        if self.lora_rank and "language_model" not in self.trained_parts:
            raise NanoVLMError(
                f"--lora-rank {self.lora_rank} adapts the language model, but --train does not name language_model; add it"
            )
        if self.quantize and "language_model" in self.trained_parts and not self.lora_rank:
            raise NanoVLMError(
                f"--quantize {self.quantize} freezes the language model, and --train names language_model; add --lora-rank, or "
                "take language_model out"
            )

    @property
    def trained_parts(self) -> tuple[str, ...]:
        return tuple(part.strip() for part in self.train.split(",") if part.strip())

    def peak_lr(self, part: str) -> float:
        """The learning rate of `part` at the top of the schedule."""
        return getattr(self, f"lr_{part}") or self.lr


def load_settings(stage: str, arguments: list[str] | None = None) -> Settings:
    """Settings of `stage` ("stage1" or "stage2"): the preset's or file's, then the command line's."""
    parser = _parser(stage)
    flags = vars(parser.parse_args(arguments))
    preset, config, stage = flags.pop("preset"), flags.pop("config"), flags.pop("stage")
    path = _source(preset, config)
    if flags["tiny"] and not (preset or config):
        raise NanoVLMError(
            "--tiny shrinks a preset, and the default is as small already; name one with --preset"
        )
    layers = [_read_stage(path, stage)]
    if flags["tiny"]:
        layers.append(_at_toy_size(layers[0]))
    if flags["resume"]:  # a run goes on with its own settings
        path = Path(flags["out"] or layers[-1].get("out", Settings.out)) / "settings.toml"
        if not path.exists():
            raise NanoVLMError(
                f"{path}: is not there, so there is no run to continue; start it without --resume"
            )
        layers = [_read_stage(path, stage)]
    layers.append({name: value for name, value in flags.items() if value is not None})
    if flags["resume"] and not flags["allow_changes"]:
        _refuse_changes(*layers, path)
    values: dict[str, Any] = {}
    for layer in layers:
        for cause, chosen in CHOSEN_FOR.items():
            if cause in layer:
                values = {name: value for name, value in values.items() if name not in chosen}
        values |= layer
    return from_dict(Settings, values, where=str(path))


def stage_names(arguments: list[str] | None = None) -> list[str]:
    """The stages of the preset or file that a command line names; none of a run's `settings.toml`, which is one stage."""
    given = _parser("stage1").parse_args(arguments)
    return [
        name
        for name, values in _read_tables(_source(given.preset, given.config)).items()
        if isinstance(values, dict)
    ]


def _source(preset: str | None, config: str | None) -> Path:
    return Path(config) if config else PRESETS / f"{preset or 'tiny'}.toml"


def _refuse_changes(before: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    """A run goes on as it began, or its result is neither the one nor the other."""
    changed = [
        f"--{name.replace('_', '-')} {now[name]} (was {before[name]})"
        for name in now
        if name in before
        and now[name] not in (before[name], "auto")
        and name not in FREE_TO_CHANGE
        and Settings.__dataclass_fields__[name].metadata["group"] != "run"
    ]
    if changed:
        raise NanoVLMError(
            f"{path}: the run began with other settings, and these would change its result: {', '.join(changed)}; "
            "leave them out, or give --allow-changes"
        )


def to_toml(settings: Settings) -> str:
    """The resolved settings as a file that `--config` reads; `json` and TOML spell these values alike."""
    return "".join(
        f"{name} = {json.dumps(value, ensure_ascii=False)}\n"
        for name, value in dataclasses.asdict(settings).items()
    )


def _at_toy_size(values: dict[str, Any]) -> dict[str, Any]:
    """What `--tiny` changes in a preset's stage besides the model's widths (`shapes.toy_config`): data that is there, a
    folder of its own, fewer and smaller steps, and a rate at which random weights learn."""
    toy = {
        "tiny": True,
        "data": "data/scenes/train.jsonl",
        "val": "data/scenes/val.jsonl",
        "val_samples": 64,
        "max_steps": 200,
        "batch_size": 16,
        "accumulate": 1,
        "lr": 1e-3,
        "dtype": "float32",
        "checkpointing": False,
    }
    if values.get("objective") == "dpo":
        toy |= {"data": TOY_PAIRS, "val": "", "lr": 3e-5}
    for name, limit in (
        ("language_model_layers", TOY_LAYERS // 2),
        ("vision_encoder_layers", TOY_LAYERS // 2),
        ("lora_rank", 8),
    ):
        toy[name] = min(values.get(name, 0), limit)
    return toy | {
        name: values[name].replace("runs/", "runs/tiny-", 1)
        for name in ("out", "init")
        if name in values
    }


def _read_tables(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        available = ", ".join(sorted(preset.stem for preset in PRESETS.glob("*.toml")))
        raise NanoVLMError(
            f"{path}: cannot be read ({error.strerror}); presets are {available}"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise NanoVLMError(f"{path}: is not valid TOML ({error}); mend that line") from None


def _read_stage(path: Path, stage: str) -> dict[str, Any]:
    """The stage's table of a preset, or a whole file that has no such tables (a run's `settings.toml`)."""
    table = _read_tables(path)
    stages = [name for name, values in table.items() if isinstance(values, dict)]
    if stage not in table and stages and stage not in STAGES:
        raise NanoVLMError(f"{path}: has no stage {stage!r}; its stages are {', '.join(stages)}")
    values = table.get(stage, {} if stages else table)
    for key in values:
        if key not in Settings.__dataclass_fields__:
            raise unknown_key(key, Settings.__dataclass_fields__, f"{path}, [{stage}]")
    return {
        key: value.replace("{assets}", str(ASSETS)) if isinstance(value, str) else value
        for key, value in values.items()
    }


def _parser(stage: str) -> CommandParser:
    parser = CommandParser(
        prog=f"train_{stage}.py",
        usage="%(prog)s [--preset NAME | --config FILE.toml] [flags]",
        description=f"Train {stage}; without flags, the tiny default. Flags override the preset.",
    )
    named = parser.add_argument_group("source of settings")
    source = named.add_mutually_exclusive_group()
    presets = ", ".join(sorted(path.stem for path in PRESETS.glob("*.toml")))
    source.add_argument("--preset", metavar="NAME", help=f"a file of nanovlm/presets: {presets}")
    source.add_argument(
        "--config", metavar="FILE.toml", help="your own file, or the settings.toml of a run"
    )
    if stage == "stage1":
        parser.set_defaults(stage=stage)
    else:
        named.add_argument(
            "--stage",
            metavar="NAME",
            default=stage,
            help="a later stage of it, such as stage3 or dpo",
        )
    groups: dict[str, Any] = {}
    for setting in dataclasses.fields(Settings):
        group = setting.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        flag = f"--{setting.name.replace('_', '-')}"
        if setting.type is bool:
            groups[group].add_argument(
                flag,
                action=argparse.BooleanOptionalAction,
                default=None,
                help=setting.metadata["help"],
            )
        else:
            groups[group].add_argument(
                flag,
                type=setting.type,
                metavar=setting.type.__name__.upper(),
                default=None,
                help=setting.metadata["help"],
            )
    return parser
