"""Words first: the projector learns to name the words of an image's captions.

In stage 1 a projector that knows nothing is taught by whole sentences, through a language model
whose passes are dear. What it has to learn first is cheaper to say: which words belong to an image.
So before stage 1 it learns just that, from the vision encoder's features and the embedding table of
the language model, in minutes. The last blocks of the vision encoder may learn along.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovlm.data.words import Vocabulary, WordBatch
from nanovlm.inputs.batch import Batch
from nanovlm.model.vlm import VisionLanguageModel

SCALE = "word_scale"  # a parameter of the projector while it learns words


class Words:
    """The projector learns to name the words of an image's captions, before any sentence.

    Visual tokens v_1 … v_K of an image are compared with the embedding of each word w, from which
    the mean over all words is taken:

        logit(w) = log mean_k exp(scale · cosine(v_k, e_w − ē)) + log f_w / (1 − f_w)

    So one visual token that points to a word is enough, and a token that points nowhere leaves the
    word as probable as its frequency f_w, the share of the images that have it in a caption. The
    loss is the binary cross entropy with whether a caption of the image has the word, summed over
    words; a word counts once for each caption that has it, and once if none has. The language model
    gives its embedding table and is not run, so a step costs as much as what learns.

    This is close to Fang et al. 2015 ("From captions to visual concepts and back"), who detect the
    words of captions in regions of an image by multiple-instance learning with a noisy-OR. Here the
    regions are visual tokens, and the classifier is the embedding table that reads them afterwards.

    Its targets are images. Metrics: of the five words that an image raises most above their
    frequency, the share that a caption has; and how many words of the captions have a probability
    of at least one half.
    """

    metric_names = ("precision_at_5", "words_named")

    def __init__(self, embeddings: Tensor, frequency: Tensor) -> None:
        """`embeddings` (W, C) are the words' rows of the table, `frequency` (W,) as above."""
        self.length = embeddings.norm(dim=-1).mean()  # what a visual token's is going to be
        self.directions = F.normalize(embeddings - embeddings.mean(dim=0), dim=-1)  # (W, C)
        self.frequency, self.bias = frequency, torch.logit(frequency)

    @classmethod
    def of(cls, model: VisionLanguageModel, vocabulary: Vocabulary) -> "Words":
        """With the embedding table of `model`, on its device."""
        table = model.language_model.embed_tokens.weight.detach()
        tokens = torch.tensor(vocabulary.tokens, device=table.device)
        return cls(table[tokens].float(), torch.tensor(vocabulary.frequency, device=table.device))

    def count_targets(self, batch: Batch) -> int:
        assert isinstance(batch, WordBatch)
        return len(batch.lengths)

    def __call__(self, model: VisionLanguageModel, batch: Batch) -> tuple[Tensor, Tensor]:
        assert isinstance(batch, WordBatch)
        similarities = self.similarities(model, batch)
        logits = torch.stack([self.logits(of_image) for of_image in similarities])  # (B, W)
        said, weight = batch.counts > 0, batch.counts.clamp(min=1)
        loss = F.binary_cross_entropy_with_logits(logits, said.float(), weight, reduction="sum")
        probabilities = logits.detach().sigmoid()
        best = self.found(probabilities)  # (B, 5)
        precision = said.gather(1, best).float().mean(dim=1).sum()
        named = ((probabilities >= 0.5) & said).float().sum()
        return loss, torch.stack((precision, named))

    def similarities(self, model: VisionLanguageModel, batch: WordBatch) -> list[Tensor]:
        """Of each record: (its visual tokens, W), the scale times the cosine, in fp32."""
        visual_tokens = model.encode_images(batch)
        assert visual_tokens is not None  # every record has an image
        with torch.autocast(visual_tokens.device.type, enabled=False):
            unit = F.normalize(visual_tokens.flatten(0, 1).float(), dim=-1)  # (N · K, C)
            scaled = model.projector.get_parameter(SCALE) * unit
            return [tokens @ self.directions.T for tokens in scaled.split(batch.lengths)]

    def logits(self, similarities: Tensor) -> Tensor:
        """(tokens, W) of one image → (W,)."""
        return similarities.logsumexp(dim=0) - math.log(len(similarities)) + self.bias

    def found(self, probabilities: Tensor, count: int = 5) -> Tensor:
        """(…, W) → (…, count): the words whose probability the image raises most, best first.

        Not the most probable ones: those are articles and full stops, whatever the image.
        """
        count = min(count, len(self.frequency))
        return (probabilities - self.frequency).topk(count, dim=-1).indices


def add_scale(model: VisionLanguageModel) -> None:
    """Give the projector the scale of `Words`, which is trained and kept in checkpoints with it."""
    device = model.projector.last_layer.weight.device
    model.projector.register_parameter(SCALE, nn.Parameter(torch.full((), 8.0, device=device)))


@torch.no_grad()
def finish_words(model: VisionLanguageModel, objective: Words, batches: Iterable[Batch]) -> None:
    """Take the scale away and give visual tokens the length that the words' embeddings have.

    The cosine says nothing about lengths, and the language model expects embeddings. `batches` are
    those over which the length is measured.
    """
    delattr(model.projector, SCALE)
    lengths = []
    for batch in batches:
        visual_tokens = model.encode_images(batch.to(objective.bias.device))
        assert visual_tokens is not None
        lengths.append(visual_tokens.float().norm(dim=-1).flatten())
    factor = objective.length / torch.cat(lengths).mean()
    for parameter in model.projector.last_layer.parameters():
        parameter.mul_(factor.to(parameter))
