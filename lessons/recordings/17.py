"""Five seeds of two settings that differ in one switch: is one of them better?"""

from pathlib import Path

from lessons.recordings.short_runs import (
    held_out,
    outcomes,
    prepare_scenes,
    stage,
    temporary_folder,
)

SEEDS = (0, 1, 2, 3, 4)
STEPS = 80  # optimizer steps of 64 questions; the preset's stage 1 takes 335
QUESTIONS = 256  # of val, the same for all runs


def record() -> dict:
    """Train stage 1 with and without the vision encoder's final norm, five seeds each."""
    prepare_scenes()
    records = held_out(QUESTIONS)
    runs = []
    for seed in SEEDS:
        for norm in (False, True):
            with temporary_folder() as folder:
                out = Path(folder) / "run"
                lines = stage("stage1", out, STEPS, seed, vision_norm=norm, val_every=0)
                right = outcomes(out / "model", records)
            runs.append(
                {
                    "seed": seed,
                    "vision_norm": norm,
                    "val_loss": round(lines[-1]["val_loss"], 4),
                    "right": "".join("1" if value else "0" for value in right),
                }
            )
            print(seed, norm, runs[-1]["val_loss"], sum(right) / len(right), flush=True)
    return {
        "steps": STEPS,
        "batch_size": 64,
        "questions": QUESTIONS,
        "kinds": [record.extra["kind"] for record in records],
        "runs": runs,
    }
