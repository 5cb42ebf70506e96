"""What can be wrong with a record; the names are those of `--drop`."""

from typing import NamedTuple

# Name → what the records of a kind have in common, as the report says it.
KINDS = {
    "broken": "an image cannot be read, so training skips the record",
    "leaked": "an image is also in the records of --val or --against, as it is or nearly",
    "duplicates": "an image is a copy of an earlier one, or the record repeats an earlier one",
    "near-duplicates": "an image looks like an earlier one, resized or compressed again",
    "blank": "an image has one colour only",
    "empty": "an answer has no letter, digit or symbol, or stands for nothing (NaN, null)",
    "repeated": "an answer says the same over and over, or is the same long text for many images",
    "garbled": "a text was decoded wrongly, or holds control characters or HTML entities",
    "boilerplate": "an answer speaks about itself or about an image that it cannot see",
    "copied": "an answer is its question",
    "language": "a long answer is in another language than its question",
    "short": "a description is asked for, and the answer has one or two words",
    "too-long": "an answer has more than 2,000 words, or the record more tokens than --max-length",
    "asked-twice": "a conversation asks the same question twice",
}


class Finding(NamedTuple):
    """One thing that is wrong with a record."""

    kind: str  # of KINDS
    record: int  # its number in the records that were read
    detail: str
    severity: float = 0.0  # of a kind, those with the most are shown
