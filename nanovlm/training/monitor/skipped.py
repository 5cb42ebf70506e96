"""Records that could not be used, or had to be cut: each is named once, and all are counted."""

from collections.abc import Sequence

from nanovlm.data.batches import LoadedBatch
from nanovlm.data.records import MAX_NAMED, Record, are_too_many, check_images, check_skipped
from nanovlm.errors import see
from nanovlm.training.distributed.parallel import Parallel
from nanovlm.utils.console import say

SMALL = 2000  # records, all of which are looked at before a run stops
ADVICE = {"skipped": see("skipped-records"), "cut": see("never-ends")}


class Skipped:
    """What all processes together skipped and cut of `records`.

    Too many skipped records stop the run; in a small set, all whose images are broken are named.
    """

    def __init__(self, records: Sequence[Record], parallel: Parallel) -> None:
        self._records, self._parallel = records, parallel
        # Dictionaries as ordered sets: the reasons in the order in which they came up.
        self._reasons: dict[str, dict[str, None]] = {"skipped": {}, "cut": {}}

    def note(self, loaded: Sequence[LoadedBatch]) -> None:
        """Name the new ones in these batches, up to MAX_NAMED of each kind.

        All processes have to call it.
        """
        for kind, known in self._reasons.items():
            own = [reason for item in loaded for reason in getattr(item, kind)]
            for reason in self._parallel.all_lines(own):
                if reason not in known and len(known) < MAX_NAMED:
                    say(f"{kind}: {reason}")
                known[reason] = None
        skipped = list(self._reasons["skipped"])
        if are_too_many(skipped, len(self._records)) and len(self._records) <= SMALL:
            skipped = list(dict.fromkeys([*skipped, *check_images(self._records)[1]]))
        check_skipped(skipped, len(self._records))

    def summarise(self) -> None:
        """Say how many there were."""
        for kind, reasons in self._reasons.items():
            if reasons:
                first = "" if len(reasons) <= MAX_NAMED else f"the first {MAX_NAMED} of them "
                say(
                    f"{kind}: {len(reasons)} of {len(self._records)} records, {first}named above; "
                    f"{ADVICE[kind]}"
                )
