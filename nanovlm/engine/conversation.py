"""A conversation of several turns: each token is read once, and each image is encoded once.

The keys and values of what has been read stay in a cache. A later turn repeats the conversation so
far and adds to it; only what is added is read.
"""

import dataclasses
from collections.abc import Callable

import torch

from nanovlm.generate import Prompt, complete
from nanovlm.inputs.batch import Batch
from nanovlm.model.attention import KVCache
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.sampling import Sampling

SPARE = 512  # tokens that a cache has room for beyond those of the turn that it is made for


class Conversation:
    """`generate` for the turns of one conversation.

    Nothing has to be said about what is new: a turn is compared with what the cache holds, token by
    token and tile by tile, and the cache is used up to the first difference. So an answer may be
    taken back, or the conversation begun anew.
    """

    def __init__(self, model: VisionLanguageModel) -> None:
        self.model = model
        self.cache: KVCache | None = None
        self.input_ids: list[int] = []  # those whose keys and values the cache holds
        self.pixels = torch.empty(0)  # (n, 3, H, W) of the tiles among them

    @torch.inference_mode()
    def generate(
        self,
        batch: Batch,
        max_new_tokens: int = 128,
        sampling: Sampling = Sampling(),
        on_tokens: Callable[[list[int]], None] | None = None,
    ) -> list[int]:
        """Answer a conversation of one row, given from its beginning, as `nanovlm.generate` does.

        The answer is that of a model that reads everything again, up to rounding.
        """
        prompt = self._prompt(batch, max_new_tokens)
        ids = batch.input_ids[0].tolist()

        def keep(tokens: list[int]) -> None:
            ids.extend(tokens)
            if on_tokens is not None:
                on_tokens(tokens)

        try:
            return complete(self.model, prompt, max_new_tokens, sampling, keep)[0]
        finally:  # also where `on_tokens` ends the answer
            assert prompt.cache is not None
            self.input_ids = ids[: prompt.cache.length]

    def _prompt(self, batch: Batch, max_new_tokens: int) -> Prompt:
        """What of `batch` is new, behind a cache of the rest."""
        read = self._read_before(batch)
        self.input_ids = self.input_ids[:read]
        length = batch.input_ids.shape[1]
        language_model = self.model.language_model
        needed = min(length + max_new_tokens, language_model.config.max_position_embeddings)
        if self.cache is None or self.cache.max_length < needed:
            with_room = needed + SPARE
            if self.cache is None or not read:
                self.cache = language_model.new_cache(1, with_room)
            else:
                self.cache = self.cache.longer(with_room)
        self.cache.length = read
        groups, new = self.model.image_groups(batch), _from(batch, read, self.model.image_length)
        embeddings = self.model.embed(new)
        self.pixels = torch.empty(0) if batch.pixels is None else batch.pixels
        return Prompt(embeddings, batch.input_ids, groups=groups, cache=self.cache)

    def _read_before(self, batch: Batch) -> int:
        """How many of the first tokens of `batch` the cache holds; never all of them."""
        ids, held = batch.input_ids[0].tolist(), self.input_ids
        same = common_length(ids[:-1], held)
        pixels = torch.empty(0) if batch.pixels is None else batch.pixels
        starts = batch.image_positions[:: self.model.image_length].tolist()
        for index, start in enumerate(starts):
            whole = start + self.model.image_length <= same
            if not whole or not torch.equal(pixels[index], self.pixels[index]):
                same = min(same, start)
                break
        config = self.model.config.language_model
        if config.rope_type == "dynamic_ntk" and len(ids) > config.original_max_position_embeddings:
            return 0  # the keys of shorter prompts are rotated by other angles
        return same


def _from(batch: Batch, start: int, image_length: int) -> Batch:
    """The tokens of a batch of one row from `start` on, and the tiles among them."""
    later = batch.image_positions >= start
    tiles = int((~later).sum()) // image_length
    return dataclasses.replace(
        batch,
        input_ids=batch.input_ids[:, start:],
        image_positions=batch.image_positions[later] - start,
        pixels=None if batch.pixels is None or not later.any() else batch.pixels[tiles:],
    )


def common_length(first: list[int], second: list[int]) -> int:
    """The length of the longest common beginning."""
    for index, (one, other) in enumerate(zip(first, second)):
        if one != other:
            return index
    return min(len(first), len(second))
