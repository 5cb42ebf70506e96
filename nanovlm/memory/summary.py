"""What a preset's model is, and what of it learns in each stage: one table."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from nanovlm.inputs.image import tile_grid
from nanovlm.memory.predict import Prediction
from nanovlm.memory.shapes import Work, prepared, skeleton
from nanovlm.model.moe import MixtureOfExperts
from nanovlm.model.vlm import VisionLanguageModel, VLMConfig
from nanovlm.training.precision import Precision
from nanovlm.training.settings import Settings

PHOTO = (1600, 1200)  # pixels of a photo, as most cameras and telephones take it


@dataclass(frozen=True)
class Stage:
    """A stage of training as it is predicted."""

    name: str
    settings: Settings
    config: VLMConfig
    work: Work
    precision: Precision
    prediction: Prediction


def summary(stages: list[Stage]) -> str:
    """Parameters of each part, how many of them learn in each stage and the stage's peak; visual tokens of an image."""
    settings, model = stages[0].settings, skeleton(stages[0].config)
    names = {
        "vision_encoder": f"eyes {Path(settings.vision_encoder).name}",
        "projector": f"projector {model.config.projector.kind}",
        "language_model": f"voice {Path(settings.language_model_shape or settings.language_model).name}",
    }
    learning = [prepared(stage.config, stage.settings, stage.precision) for stage in stages]
    rows = [["", "parameters", *(f"{stage.name} learns" for stage in stages)]]
    for part in ("vision_encoder", "projector", "language_model"):
        rows.append(
            [
                names[part].strip(),
                _millions(parameters(getattr(model, part))),
                *(_learning(getattr(learner, part)) for learner in learning),
            ]
        )
    rows.append(["together", _millions(parameters(model)), *map(_learning, learning)])
    rows.append(
        ["peak of a step", "", *(f"{stage.prediction.peak / 1e9:.2f} GB" for stage in stages)]
    )
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    return "\n".join([*lines, *_experts(model.language_model), visual_tokens(model)])


def visual_tokens(model: VisionLanguageModel) -> str:
    """A line: the visual tokens of an image and, where images are cut into tiles, of the largest and of a photo."""
    image, each = model.config.image, model.image_length
    if image.max_tiles_per_image == 1:
        return f"an image of {image.height}×{image.width} takes {each} visual tokens"
    rows, columns = tile_grid(*PHOTO, image)
    return (
        f"an image takes up to {model.max_image_length} visual tokens ({image.max_tiles_per_image} pictures of {each}), a photo "
        f"of 4:3 {(rows * columns + 1) * each} ({rows}×{columns} tiles and the whole)"
    )


def parameters(module: nn.Module) -> int:
    """How many numbers a module holds as parameters; what is quantised is not among them."""
    return sum(parameter.numel() for parameter in module.parameters())


def _experts(decoder: nn.Module) -> list[str]:
    """A line on how much of the decoder a token passes, where there is a choice."""
    choices = [module for module in decoder.modules() if isinstance(module, MixtureOfExperts)]
    passed_by = sum(
        parameters(module.experts) * (1 - module.per_token / len(module.experts))
        for module in choices
    )
    return (
        [
            f"a token passes {_millions(parameters(decoder) - passed_by)} of the voice: {choices[0].per_token} of "
            f"{len(choices[0].experts)} experts, and {len(choices[0].shared_experts)} shared"
        ]
        if choices
        else []
    )


def _learning(module: nn.Module) -> str:
    count = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    return _millions(count) if count else "—"


def _millions(count: float) -> str:
    return f"{count / 1e6:.1f}M"
