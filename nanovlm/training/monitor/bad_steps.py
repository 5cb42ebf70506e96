"""Steps whose loss or gradient is not a finite number: they change nothing, and their records are named."""

import math
from pathlib import Path

from nanovlm.errors import NanoVLMError
from nanovlm.training.monitor.log import append_lines, keep_lines


class BadSteps:
    """Appends to `bad_steps.jsonl`; a resumed run drops the lines after its checkpoint, as it will write them again."""

    def __init__(self, run: Path, start_step: int, limit: int) -> None:
        self.limit = limit
        self.path = run / "bad_steps.jsonl"
        keep_lines(self.path, start_step)

    def note(
        self, step: int, loss: float, grad_norm: float, records: list[str], in_a_row: int
    ) -> None:
        """Write one down, with its records; raises once `limit` have come in a row."""
        line = {
            "step": step,
            "loss": str(loss),
            "grad_norm": str(grad_norm),
            "records": records,
        }  # JSON has no NaN
        append_lines(self.path, [line])
        if in_a_row >= self.limit:
            what = "loss" if not math.isfinite(loss) else "gradient"
            raise NanoVLMError(
                f"the {what} was not finite in {in_a_row} steps in a row, up to step {step}; their records are in {self.path}. "
                f"Lower --lr, or take --dtype float32 to see whether the number format is at fault; no weight was changed by them"
            )
