"""Steps whose loss or gradient is not a finite number: they change nothing, and their records are named."""

import json
import math
from pathlib import Path

from nanovlm.errors import NanoVLMError
from nanovlm.files import read_lines, write_atomically


class BadSteps:
    """Appends to `bad_steps.jsonl`; a resumed run drops the lines after its checkpoint, as it will write them again."""

    def __init__(self, run: Path, start_step: int, limit: int) -> None:
        self.run, self.limit = run, limit
        self.path = run / "bad_steps.jsonl"
        if self.path.exists():
            kept = [line for line in read_lines(self.path) if line["step"] <= start_step]
            write_atomically(self.path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))

    def note(self, step: int, loss: float, grad_norm: float, records: list[str], in_a_row: int) -> None:
        """Write one down, with its records; raises once `limit` have come in a row."""
        line = {"step": step, "loss": str(loss), "grad_norm": str(grad_norm), "records": records}  # JSON has no NaN
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        if in_a_row >= self.limit:
            what = "loss" if not math.isfinite(loss) else "gradient"
            raise NanoVLMError(
                f"the {what} was not finite in {in_a_row} steps in a row, up to step {step}; their records are in {self.path}. "
                f"Lower --lr, or take --dtype fp32 to see whether the number format is at fault; the last checkpoint is from before them")
