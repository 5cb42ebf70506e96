"""Token sequences and pixels → a batch, and the whole way from conversations in one call.

Lessons: lessons/source/05_conversations.py, lessons/source/16_batches.py.
"""

from collections.abc import Iterable, Sequence

import torch
from PIL import Image
from torch import Tensor

from nanovlm.data.sequences import TokenSequence
from nanovlm.errors import NanoVLMError
from nanovlm.inputs.batch import Batch
from nanovlm.inputs.chat import IGNORED, Message
from nanovlm.inputs.image import image_pixels
from nanovlm.model.vlm import VisionLanguageModel


def prepare(
    model: VisionLanguageModel,
    conversations: Sequence[Sequence[Message]],
    images: Sequence[Iterable[Image.Image]],
    *,
    add_generation_prompt: bool = False,
) -> Batch:
    """A batch of conversations, on the CPU: their ids, and their images as pixels.

    `images[i]` are the RGB images (`open_image`) of conversation i, in the order of its `IMAGE`s.
    Only those of one conversation are held at a time, if they come from a generator. With
    `add_generation_prompt` every conversation ends with the opening of an answer, which `generate`
    writes, and padding is on the left, so that all end together; otherwise it is on the right.
    One conversation alone has no attention mask, because there is no padding.

    Raises NanoVLMError, with both numbers, where images and their places differ in number.
    """
    if not conversations or len(conversations) != len(images):
        raise NanoVLMError(
            f"{len(conversations)} conversations and the images of {len(images)}; "
            "give one list of images for each conversation, and at least one conversation"
        )
    sequences, pixels = [], []
    for messages, opened in zip(conversations, map(list, images)):
        sequence, tiles = encode(model, messages, opened, add_generation_prompt)
        sequences.append(sequence)
        pixels += tiles
    batch = collate(sequences, model.chat.image_token_id, pixels, pad_left=add_generation_prompt)
    if len(sequences) == 1:
        batch.attention_mask = None
    return batch


def encode(
    model: VisionLanguageModel,
    messages: Sequence[Message],
    images: Sequence[Image.Image],
    add_generation_prompt: bool = False,
) -> tuple[TokenSequence, list[Tensor]]:
    """One conversation's tokens, and the (n, 3, H, W) tiles of each of its images."""
    tokens = [model.image_tokens(*image.size) for image in images]
    sample = model.chat.encode(messages, tokens, add_generation_prompt=add_generation_prompt)
    return TokenSequence.of(sample), [image_pixels(image, model.config.image) for image in images]


def collate(
    sequences: Sequence[TokenSequence],
    image_token_id: int,
    pixels: Sequence[Tensor] = (),
    *,
    patches: Sequence[Tensor] = (),
    pad_left: bool = False,
    multiple: int = 1,
) -> Batch:
    """Pad sequences to one length, and find where images go and what is to be predicted.

    `pixels` are the (n, 3, H, W) tiles of each image in order, or `patches` the (n, P, C_v) outputs
    of the vision encoder for them. The length becomes a multiple of `multiple`.
    """
    length = -(-max(map(len, sequences)) // multiple) * multiple

    def stack(rows: Iterable[list[int]], padding: int) -> Tensor:
        padded = torch.full((len(sequences), length), padding)
        for row, values in zip(padded, rows):
            row[length - len(values) if pad_left else 0 :][: len(values)] = torch.tensor(values)
        return padded  # (B, T)

    input_ids = stack((sequence.input_ids for sequence in sequences), 0)
    labels = stack((sequence.labels for sequence in sequences), IGNORED).flatten()
    attention_mask = stack((sequence.attention_mask for sequence in sequences), 0)
    is_placeholder = (input_ids == image_token_id) & (attention_mask > 0)
    labelled = (labels != IGNORED).nonzero()[:, 0]  # (M,)
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        image_positions=is_placeholder.flatten().nonzero()[:, 0],
        target_positions=labelled - 1,
        targets=labels[labelled],
        pixels=torch.cat(list(pixels)) if pixels else None,
        patches=torch.cat(list(patches)) if patches else None,
        right_padded=not pad_left and not any(sequence.has_branches for sequence in sequences),
    )
