"""What became of a source's records: counts, and each reason with examples."""

import re
from dataclasses import asdict, dataclass, field
from typing import Any

EXAMPLES = 3  # of each reason
# The first pattern that a reason has is its heading.
HEADINGS = (
    (r"image .*not on this machine", "image on the web"),
    (r"image .*(does not exist|is missing|is not (?:in the map|among|listed))", "image missing"),
    (r"image .*may be any of", "image name that several have"),
    (r"image ", "image that cannot be read"),
    (r"markers and the record", "image markers that do not match the images"),
    (r"which is no image here", "marker of another program"),
    (r"not read and would change|has images in", "keys that are not read"),
    (
        r"has no (?:answer|caption)|has no text|no text in|last turn is not the a",
        "no answer or no text",
    ),
    (r"turn before the answers|expected an object with role", "no answer or no text"),
    (r"not to be learned|is to be learned|all or nothing is learned", "not to be learned"),
    (r"neither messages nor|not clear which|is not read|list of texts|differ", "turns not clear"),
    (r"a turn has (?:role|from)", "turns of another role"),
    (r"the same|chosen|rejected", "pair that cannot be used"),
    (r"valid JSON|UTF-8|columns|is a line of|half of a|without end", "damaged"),
    (r"JSON \w+, expected|#NUMBER caption|is not an object with q", "damaged"),
)
OTHER = "other"


def printed(text: str) -> str:
    """A text that UTF-8 can hold: bytes of a file's name that are none are escaped."""
    return text.encode(errors="backslashreplace").decode()


@dataclass
class Report:
    """Counts of what is read, written and skipped; `records_in` is the sum of the other two."""

    records_in: int = 0
    records_out: int = 0
    images: int = 0  # of the records written; one that two records show counts twice
    skipped: dict[str, dict[str, Any]] = field(default_factory=dict)
    passed_over: dict[str, int] = field(default_factory=dict)  # what is no loss

    def skip(self, where: str, reason: str) -> None:
        """Count a record that cannot be used, and keep it as an example of its heading."""
        self.records_in += 1
        heading = next((name for text, name in HEADINGS if re.search(text, reason)), OTHER)
        entry = self.skipped.setdefault(heading, {"count": 0, "examples": []})
        entry["count"] += 1
        if len(entry["examples"]) < EXAMPLES:
            entry["examples"].append(printed(f"{where}: {reason}"))

    def lines(self) -> list[str]:
        """A line for each heading, the largest first, with an example."""
        found = sorted(self.skipped.items(), key=lambda item: -item[1]["count"])
        return [
            f"skipped: {entry['count']:,} × {name}, e.g. {entry['examples'][0]}"
            for name, entry in found
        ] + [f"passed over: {count:,} × {note}" for note, count in self.passed_over.items()]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
