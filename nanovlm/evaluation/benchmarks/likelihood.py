"""Which of several answers a model finds most likely; each prompt is read once for all of them.

An answer's score is its log-probability after the prompt, summed over its tokens and without the
end of the turn. For questions that list their options, the answers are the options' letters, as
MMLU is scored (Hendrycks et al. 2021; "acc" of lm-evaluation-harness); for yes/no questions they
are the two words. Such answers are equally long, so there is nothing to normalise.

Lesson: lessons/source/17_measuring.py.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nanovlm.data.collate import collate
from nanovlm.data.records import Record
from nanovlm.data.sequences import TokenSequence
from nanovlm.errors import NanoVLMError
from nanovlm.evaluation.answers import in_batches, other_images, prompt_of
from nanovlm.generate import Prompt, Steps
from nanovlm.inputs.image import image_pixels, open_image
from nanovlm.model.vlm import VisionLanguageModel


def rank_choices(
    model: VisionLanguageModel,
    records: Sequence[Record],
    batch_size: int = 32,
    control: str = "none",
) -> Iterator[list[float] | None]:
    """The log-probability of each of a record's `choices` (a key of `extra`), in order.

    control and records that give None: as in `answer_records`. Records of one image are best
    beside each other: it is encoded once for those of a batch.
    """
    others = other_images(records) if control == "shuffled" else {}
    limit = model.config.language_model.max_position_embeddings

    @torch.inference_mode()
    def score(part: Sequence[Record]) -> list[list[float]]:
        prompt = read_prompts(model, part, others, blind=control == "blind")
        choices = [list(map(model.chat.answer_ids, record.extra["choices"])) for record in part]
        longest = prompt.input_ids.shape[1] + max(len(ids) for row in choices for ids in row)
        if longest > limit:
            raise NanoVLMError(
                f"a question and its answer take {longest} tokens, more than the language model's "
                f"{limit} positions"
            )
        return score_choices(model, prompt, choices)

    return in_batches(score, records, batch_size)


def read_prompts(
    model: VisionLanguageModel, records: Sequence[Record], others: dict, blind: bool = False
) -> Prompt:
    """The prompts of several records, left-padded, with each of their images encoded once.

    others: the image that is shown in place of another one. blind: show the mean colour instead.
    """
    tokens, tiles, places, sequences = {}, [], [], []
    for record in records:
        shown = [others.get(path, path) for path in record.images]
        for path in shown:
            if path not in tokens:
                image = open_image(path)
                tokens[path] = model.image_tokens(*image.size)
                tiles.append(image_pixels(image, model.config.image))
        encoded = [tokens[path] for path in shown]
        sample = model.chat.encode(prompt_of(record), encoded, add_generation_prompt=True)
        sequences.append(TokenSequence.of(sample))
        places += shown
    batch = collate(sequences, model.chat.image_token_id, pad_left=True)
    if len(records) == 1:
        batch.attention_mask = None
    batch = batch.to(next(model.parameters()).device)
    visual_tokens = None
    if tiles:
        pixels = torch.cat(tiles)
        if blind:
            pixels.zero_()  # pixels are normalised, so zero is the mean colour
        encoded = model.projector(model.vision_features(pixels.to(batch.input_ids.device)))
        of_each = dict(zip(tokens, encoded.split([len(part) for part in tiles])))
        visual_tokens = torch.cat([of_each[path] for path in places])  # (N, K, C_t)
    embeddings = model.splice(batch, visual_tokens)
    groups = model.image_groups(batch)
    return Prompt(embeddings, batch.input_ids, batch.attention_mask, groups)


@torch.inference_mode()
def score_choices(
    model: VisionLanguageModel, prompt: Prompt, choices: Sequence[Sequence[Sequence[int]]]
) -> list[list[float]]:
    """The log-probability of each choice, as its token ids, after each of B prompts.

    The first tokens of all choices come from one pass over the prompts. Only choices of more than
    one token take further passes, behind the same cache.
    """
    longest = max(len(ids) for row in choices for ids in row)
    steps = Steps(model.language_model)
    first = steps.begin(prompt, prompt.input_ids.shape[1] + longest).log_softmax(-1)  # (B, V)
    scores = [[float(first[row, ids[0]]) for ids in of_row] for row, of_row in enumerate(choices)]
    if longest == 1:
        return scores
    assert steps.cache is not None
    after_prompt = steps.cache.length, steps.mask, steps.groups
    for number in range(max(map(len, choices))):
        column = [list(of_row[number]) if number < len(of_row) else [] for of_row in choices]
        steps.cache.length, steps.mask, steps.groups = after_prompt
        for place in range(1, max(map(len, column))):
            log_probabilities = steps.add(_tokens_at(place - 1, column, first)).log_softmax(-1)
            for row, ids in enumerate(column):
                if place < len(ids):
                    scores[row][number] += float(log_probabilities[row, ids[place]])
    return scores


def _tokens_at(place: int, column: Sequence[Sequence[int]], like: Tensor) -> Tensor:
    """The token at `place` of each choice, (B,); 0 where it has ended, which nothing looks at."""
    return torch.tensor([ids[place] if place < len(ids) else 0 for ids in column]).to(like.device)
