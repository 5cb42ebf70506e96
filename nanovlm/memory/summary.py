"""The parts of a preset's model and what is trainable in each stage, in one table."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from nanovlm.inputs.image import tile_grid
from nanovlm.memory.predict import Prediction
from nanovlm.memory.shapes import prepared, skeleton
from nanovlm.model.moe import MixtureOfExperts
from nanovlm.model.vlm import VisionLanguageModel, VLMConfig
from nanovlm.training.monitor.walk import BatchShape
from nanovlm.training.precision import Precision
from nanovlm.training.settings import Settings

PHOTO = (1600, 1200)  # pixels; the aspect ratio of most cameras and telephones


@dataclass(frozen=True)
class Stage:
    """A training stage and the prediction for it."""

    name: str
    settings: Settings
    config: VLMConfig
    shape: BatchShape
    precision: Precision
    prediction: Prediction


def summary(stages: list[Stage]) -> str:
    """A table of each part's parameters, those trainable in each stage, and the stages' peaks.

    Then the visual tokens of an image.
    """
    settings, model = stages[0].settings, skeleton(stages[0].config)
    language_model = Path(settings.language_model_shape or settings.language_model).name
    titles = {
        "vision_encoder": f"vision encoder {Path(settings.vision_encoder).name}".strip(),
        "projector": f"projector {model.config.projector.kind}",
        "language_model": f"language model {language_model}".strip(),
    }
    models = [prepared(stage.config, stage.settings, stage.precision) for stage in stages]
    rows = [["", "parameters", *(f"{stage.name} trainable" for stage in stages)]]
    for part, title in titles.items():
        trainable = [_trainable(model.get_submodule(part)) for model in models]
        rows.append([title, _millions(parameters(model.get_submodule(part))), *trainable])
    rows.append(["total", _millions(parameters(model)), *map(_trainable, models)])
    peaks = [f"{stage.prediction.peak / 1e9:.2f} GB" for stage in stages]
    rows.append(["peak of a step", "", *peaks])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    return "\n".join([*lines, *_experts(model.language_model), visual_tokens(model)])


def visual_tokens(model: VisionLanguageModel) -> str:
    """A line: the visual tokens of an image, or, if it is cut, of the largest one and a photo."""
    image, each = model.config.image, model.image_length
    if image.max_tiles_per_image == 1:
        return f"an image of {image.height}×{image.width} takes {each} visual tokens"
    rows, columns = tile_grid(*PHOTO, image)
    return (
        f"an image takes up to {model.max_image_length} visual tokens ({image.max_tiles_per_image} "
        f"tiles of {each}, the whole image included), a photo of 4:3 {(rows * columns + 1) * each} "
        f"({rows}×{columns} tiles and the whole image)"
    )


def parameters(module: nn.Module) -> int:
    """How many numbers a module holds as parameters; quantised matrices are not counted."""
    return sum(parameter.numel() for parameter in module.parameters())


def _experts(language_model: nn.Module) -> list[str]:
    """A line on how many parameters a token uses, if there are experts to choose from."""
    mixtures = [part for part in language_model.modules() if isinstance(part, MixtureOfExperts)]
    if not mixtures:
        return []
    unused = sum(
        parameters(mixture.experts) * (1 - mixture.per_token / len(mixture.experts))
        for mixture in mixtures
    )
    first = mixtures[0]
    used = _millions(parameters(language_model) - unused)
    experts = f"{first.per_token} of {len(first.experts)} experts"
    shared = f"{len(first.shared_experts)} shared"
    return [f"a token uses {used} of the language model: {experts}, and {shared}"]


def _trainable(module: nn.Module) -> str:
    count = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    return _millions(count) if count else "—"


def _millions(count: float) -> str:
    return f"{count / 1e6:.1f}M"
