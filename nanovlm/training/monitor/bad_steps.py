"""Steps whose loss or gradient is not finite: they change nothing, and their records are named."""

import math
from pathlib import Path

from nanovlm.errors import NanoVLMError, see
from nanovlm.training.monitor.log import append_lines, keep_lines


class BadSteps:
    """Appends to `bad_steps.jsonl`.

    A resumed run drops the lines after its checkpoint, since it repeats those steps.
    """

    def __init__(self, run: Path, start_step: int, limit: int) -> None:
        self.limit = limit
        self.path = run / "bad_steps.jsonl"
        keep_lines(self.path, start_step)

    def note(
        self, step: int, loss: float, grad_norm: float, records: list[str], in_a_row: int
    ) -> None:
        """Append a step and its records; raises once `limit` have come in a row."""
        line = {  # as text, since JSON has no NaN
            "step": step,
            "loss": str(loss),
            "grad_norm": str(grad_norm),
            "records": records,
        }
        append_lines(self.path, [line])
        if in_a_row >= self.limit:
            what = "loss" if not math.isfinite(loss) else "gradient"
            raise NanoVLMError(
                f"the {what} was not finite in {in_a_row} steps in a row, up to step {step}; "
                f"their records are in {self.path}. Lower --lr, or take --dtype float32 to see "
                "whether the compute dtype is at fault; no weight was changed by them; "
                f"{see('nan')}"
            )
