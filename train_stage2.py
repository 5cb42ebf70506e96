"""Stage 2: the projector goes on learning, and the decoder learns with it to answer about images.

    python train_stage2.py                                                  # goes on from runs/stage1/model
    python train_stage2.py --init DIR --data FILE --out runs/mine
"""

from pathlib import Path

from nanovlm.errors import NanoVLMError, run, say
from nanovlm.training.run import run_stage
from nanovlm.training.settings import load_settings


def main() -> None:
    """Train from stage 1's model."""
    settings = load_settings("stage2")
    if settings.init and not Path(settings.init).exists():
        raise NanoVLMError(f"{settings.init}: there is no model to start from; run train_stage1.py first, or give --init")
    model = run_stage(settings)
    say('next:  python infer.py IMAGE "描述图片"' + ("" if settings.out == "runs/stage2" else f" --model {model}"))


if __name__ == "__main__":
    run(main)
