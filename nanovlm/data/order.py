"""The order of records in a run: a function of the records, the seed and the position alone."""

import random
from collections import defaultdict
from collections.abc import Sequence

from nanovlm.data.records import Record
from nanovlm.data.sequences import chunks


class Order:
    """The index of the record at each position of a run, epoch after epoch.

    Each epoch has every record once: shuffled, with records of the same images next to each other
    in groups of up to `share`; or without `shuffle` in the order of the files.
    """

    def __init__(self, records: Sequence[Record], share: int, seed: int, shuffle: bool) -> None:
        self.length, self.share, self.seed, self.shuffle = len(records), share, seed, shuffle
        by_image: dict[object, list[int]] = defaultdict(list)
        for index, record in enumerate(records if shuffle else ()):
            by_image[record.images or index].append(index)
        self._by_image = list(by_image.values())
        self._epoch, self._order = -1, list[int]()

    def __getitem__(self, position: int) -> int:
        if not self.shuffle:
            return position % self.length
        epoch, index = divmod(position, self.length)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        return self._order[index]

    def _shuffled(self, epoch: int) -> list[int]:
        generator = random.Random(f"{self.seed}/{epoch}")
        groups = []
        for members in self._by_image:
            if len(members) > 1:
                members = members[:]
                generator.shuffle(members)
            groups += chunks(members, self.share)
        generator.shuffle(groups)
        return [index for group in groups for index in group]
