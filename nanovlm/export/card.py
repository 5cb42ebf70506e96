"""The model card, `README.md`: what the model is made of, how it was trained, how it is asked.

It says what the model, its run folders and nothing else say.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from nanovlm.errors import NanoVLMError
from nanovlm.export.families import Form
from nanovlm.hub.adapters import CONFIG_FILE
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.training.monitor.log import read_log, series
from nanovlm.training.presets import read_tables
from nanovlm.utils.console import say
from nanovlm.utils.files import read_json, write_atomically

LAST_LINES = 5  # whose mean is the loss at the end of a run, as in `nanovlm.report`
MAX_STAGES = 8  # runs of which each starts from the one before
_CARD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- nanovlm
---

# {title}

A vision-language model of {parameters} parameters, exported by nanovlm as `{architecture}`.

## Parts

| part | shape | parameters |
|---|---|---|
{parts}

{images}

{training}## Ask it with transformers

```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "{folder}"
model = AutoModelForImageTextToText.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
content = [
    {{"type": "image", "image": Image.open("photo.jpg")}},
    {{"type": "text", "text": "描述图片"}},
]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device, model.dtype)
written = model.generate(**inputs, max_new_tokens=128)
answer = written[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))
```

## Ask it with nanovlm

```bash
python infer.py photo.jpg "描述图片" --model {folder}
```
"""


def write_card(
    model: VisionLanguageModel, form: Form, inputs: list[Path], out: tuple[Path, Path]
) -> None:
    """Write the card.

    inputs: the folder of the model and perhaps that of an adapter, of which the run folder is the
    one around it. out: the folder to write to, and what it will be called.
    """
    folder, title = out[0], _plain(out[1].resolve().name)  # without where a user keeps it
    parts = [model.vision_encoder, model.projector, model.language_model]
    shapes = [_vision(model, form), _projector(model), _language(model, form)]
    names = ["vision encoder", "projector", "language model"]
    rows = [
        f"| {part} | {shape} | {_count(module):,} |"
        for part, shape, module in zip(names, shapes, parts)
    ]
    text = _CARD.format(
        title=title,
        parameters=f"{_count(model):,}",
        architecture=form.config["architectures"][0],
        parts="\n".join(rows),
        images=_images(model),
        training=_training(inputs),
        folder=title,
    )
    write_atomically(folder / "README.md", text)


def _count(module: nn.Module) -> int:
    """Parameters, without those of adapters, which are merged."""
    named = module.named_parameters()
    return sum(it.numel() for name, it in named if not name.endswith((".lora_A", ".lora_B")))


def _vision(model: VisionLanguageModel, form: Form) -> str:
    config, family = model.config.vision_encoder, form.config["vision_config"]["model_type"]
    layer = model.config.vision_layer
    return (
        f"{family}: {config.num_hidden_layers} blocks of width {config.hidden_size}, patches of "
        f"{config.patch_size}×{config.patch_size} pixels; layer {layer} is taken"
    )


def _projector(model: VisionLanguageModel) -> str:
    config = model.config.projector
    detail = {"mlp": f" with {config.activation}", "pixel_shuffle": f" of scale {config.scale}"}
    return config.kind + detail.get(config.kind, "")


def _language(model: VisionLanguageModel, form: Form) -> str:
    config, family = model.config.language_model, form.config["text_config"]["model_type"]
    return (
        f"{family}: {config.num_hidden_layers} blocks of width {config.hidden_size}, "
        f"{config.vocab_size:,} tokens, up to {config.max_position_embeddings:,} positions"
    )


def _images(model: VisionLanguageModel) -> str:
    image, tokens = model.config.image, model.image_length
    size = f"{image.height}×{image.width} pixels"
    if image.max_tiles is None:
        return f"An image is resized to {size} and becomes {tokens} visual tokens."
    return (
        f"An image is cut into up to {image.max_tiles}×{image.max_tiles} tiles of {size}, and is "
        f"there once more as a whole; each of them becomes {tokens} visual tokens."
    )


def _training(inputs: list[Path]) -> str:
    """The section on the runs that the model comes from; nothing if no run folder is there."""
    stages = list(_stages(inputs[-1]))[::-1]
    if not stages:
        return ""
    header = ["run", "trained", "data", "steps", "samples", "loss", "best validation loss"]
    rows = [_row(folder, settings) for folder, settings in stages]
    lines = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
    first = stages[0][1]
    begun = ""
    if first.get("vision_encoder") and first.get("language_model"):
        vision, language = (_short(str(first[it])) for it in ("vision_encoder", "language_model"))
        begun = f"The first run began with `{vision}` and `{language}`. "
    note = (
        f"{begun}The loss is per labelled token, or pair, as the mean of the last {LAST_LINES} "
        "lines of the log."
    )
    return "## Training\n\n" + "\n".join(lines) + f"\n\n{note}\n\n"


def _stages(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Run folders and their settings, from the last one back."""
    if (folder / CONFIG_FILE).exists() and not (folder.parent / "settings.toml").exists():
        folder = Path(str(read_json(folder / CONFIG_FILE).get("base_model") or folder))
    seen: set[Path] = set()
    while len(seen) < MAX_STAGES and (run := folder.resolve().parent) not in seen:
        if not (run / "settings.toml").is_file():
            return
        try:
            settings = read_tables(run / "settings.toml")
        except NanoVLMError as error:
            say(f"{error}; the card leaves this run out")
            return
        seen.add(run)
        yield run, settings
        folder = Path(str(settings.get("init") or "/"))


def _row(folder: Path, settings: dict[str, Any]) -> list[str]:
    lines = read_log(folder / "metrics.jsonl")
    losses, validation = series(lines, "loss")[1][-LAST_LINES:], series(lines, "val_loss")
    last = lines[-1] if lines else {}
    best = "–"
    if validation[1]:
        loss, step = min(zip(validation[1], validation[0]))
        best = f"{loss:.4f} at step {step:,}"
    trained = str(settings.get("train", "–")).replace(",", ", ")
    if rank := settings.get("lora_rank"):
        trained += f" (LoRA of rank {rank})"
    data = ", ".join(map(_short, str(settings.get("data") or "–").split(",")))
    return [
        _plain(folder.name),
        _plain(trained),
        data,
        f"{last['step']:,}" if "step" in last else "–",
        f"{last['samples']:,}" if "samples" in last else "–",
        f"{sum(losses) / len(losses):.4f}" if losses else "–",
        best,
    ]


def _short(path: str) -> str:
    """The last two parts of a path: where a user keeps files is nobody's business."""
    return _plain("/".join(Path(path.strip()).parts[-2:]))


def _plain(text: str) -> str:
    """A text that cannot end a cell, a code span, a string or the line it stands in."""
    return "".join(" " if it in '|`"\\\r\n' else it for it in text)
