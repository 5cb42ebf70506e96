"""Records that a run could not use, or had to cut: named as they come up, once though epochs repeat, and counted."""

from nanovlm.data.batches import LoadedBatch
from nanovlm.data.records import MAX_NAMED, check_skipped
from nanovlm.training.distributed.parallel import Parallel
from nanovlm.utils.console import say


class Skipped:
    """What all processes together skipped and cut, of `records` records. Too many skipped ones stop the run."""

    def __init__(self, records: int, parallel: Parallel) -> None:
        self._records, self._parallel = records, parallel
        self._reasons: dict[str, dict[str, None]] = {
            "skipped": {},
            "cut": {},
        }  # in the order of coming up

    def note(self, loaded: list[LoadedBatch]) -> None:
        """Name what is new in these batches, up to MAX_NAMED of each kind. All processes have to call it."""
        for kind, known in self._reasons.items():
            for reason in self._parallel.all_lines(
                [reason for item in loaded for reason in getattr(item, kind)]
            ):
                if reason not in known and len(known) < MAX_NAMED:
                    say(f"{kind}: {reason}")
                known[reason] = None
        check_skipped(list(self._reasons["skipped"]), self._records)

    def summarise(self) -> None:
        """How many there were."""
        for kind, reasons in self._reasons.items():
            if reasons:
                first = "" if len(reasons) <= MAX_NAMED else f"the first {MAX_NAMED} of them "
                say(f"{kind}: {len(reasons)} of {self._records} records, {first}named above")
