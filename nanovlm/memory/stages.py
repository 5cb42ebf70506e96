"""The settings of a preset's stages, also of those whose model an earlier stage is yet to make."""

import dataclasses
from pathlib import Path

from nanovlm.training.presets import load_settings, stage_names
from nanovlm.training.settings import ModelSettings, Settings

MODEL = [field.name for field in dataclasses.fields(ModelSettings) if field.name != "init"]


def names_of_stages(asked: str, flags: list[str]) -> list[str]:
    """The stages that --stage asks for; "run" for a file without stages, such as the settings.toml
    of a run."""
    if asked == "all":
        return stage_names(flags) or ["run"]
    if asked == "both":
        return ["stage1", "stage2"]
    return [f"stage{asked}" if asked.isdigit() else asked]


def stage_settings(name: str, flags: list[str]) -> Settings:
    """The settings of a stage.

    If its --init does not exist yet, with the shapes that stage 1 is going to leave there.
    """
    settings = load_settings("stage2", [*flags, "--stage", name])
    # Other parts than those of a model that may be there already.
    other_parts = settings.vision_encoder or settings.language_model
    if settings.init and (other_parts or not Path(settings.init, "config.json").exists()):
        first = load_settings(
            "stage1", [*flags, "--train", "projector", "--lora-rank", "0", "--init", settings.init]
        )
        unset = [name for name in MODEL if getattr(settings, name) == getattr(Settings, name)]
        settings = dataclasses.replace(settings, **{name: getattr(first, name) for name in unset})
    return settings
