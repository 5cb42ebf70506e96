"""Two stages, one stage, the projector alone, a language model that has learned nothing."""

from pathlib import Path

from lessons.recordings.short_runs import (
    BOTH,
    change_of_language_model,
    held_out,
    outcomes,
    prepare_scenes,
    stage,
    temporary_folder,
    with_random_language_model,
)
from nanovlm.data.records import Record

SEEDS = (0, 1)
FIRST, SECOND = 80, 220  # optimizer steps of 64 questions; the preset takes 335 and 1,339
QUESTIONS = 192  # of val


def record() -> dict:
    """Train each arm with each seed for 300 steps; curves and accuracies."""
    prepare_scenes()
    records = held_out(QUESTIONS)
    arms: dict[str, list[dict]] = {}
    for seed in SEEDS:
        for name, train in ARMS.items():
            with temporary_folder() as folder:
                lines, model = train(Path(folder), seed)
                right = {c: outcomes(model, records, c) for c in ("none", "blind")}
                arms.setdefault(name, []).append(
                    {
                        "seed": seed,
                        "loss": [[line["step"], round(line["loss"], 4)] for line in lines],
                        "val_loss": [
                            [line["step"], round(line["val_loss"], 4)]
                            for line in lines
                            if line.get("val_loss") is not None
                        ],
                        "exact": sum(right["none"]) / len(records),
                        "blind": sum(right["blind"]) / len(records),
                        "after_stage_1": after_stage_1(Path(folder), records),
                        "language_model_moved": round(change_of_language_model(model), 4),
                    }
                )
            print(name, seed, arms[name][-1], flush=True)
    return {
        "steps": [FIRST, SECOND],
        "batch_size": 64,
        "questions": QUESTIONS,
        "seeds": list(SEEDS),
        "arms": arms,
    }


def after_stage_1(folder: Path, records: list[Record]) -> float | None:
    """The accuracy of the model between two stages, if there is one."""
    model = folder / "stage1/model"
    return sum(outcomes(model, records)) / len(records) if model.exists() else None


def two_stages(folder: Path, seed: int, **changes) -> tuple[list[dict], Path]:
    """Stage 1, then stage 2 from its model."""
    first = stage("stage1", folder / "stage1", FIRST, seed, **changes)
    second = stage(
        "stage2", folder / "stage2", SECOND, seed, init=folder / "stage1/model",
        cache_features=False,
    )  # fmt: skip
    for line in second:
        line["step"] += FIRST
    return first + second, folder / "stage2/model"


def stage_1_only(folder: Path, seed: int) -> tuple[list[dict], Path]:
    """As many steps, but the projector alone is trained."""
    return stage("stage1", folder / "run", FIRST + SECOND, seed), folder / "run/model"


def one_stage(folder: Path, seed: int) -> tuple[list[dict], Path]:
    """Projector and language model together from the first step on, at both stages' rates."""
    lines = stage(
        "stage1", folder / "run", FIRST + SECOND, seed, train=BOTH,
        lr_projector=2e-3, lr_language_model=1e-3, weight_decay=0.05,
    )  # fmt: skip
    return lines, folder / "run/model"


def random_language_model(folder: Path, seed: int) -> tuple[list[dict], Path]:
    """Both stages from a language model whose weights are random."""
    return two_stages(folder, seed, init=with_random_language_model(folder / "parts", seed))


ARMS = {
    "two stages": two_stages,
    "stage 1 only": stage_1_only,
    "one stage": one_stage,
    "random language model": random_language_model,
}
