"""Scores of answers: exact match, CIDEr-D, BLEU and wrong objects.

Given the same tokens, CIDEr-D and BLEU equal those of `pycocoevalcap`.

Lesson: lessons/source/17_measuring.py.
"""

import math
import re
import unicodedata
from collections import Counter

from nanovlm.errors import NanoVLMError

MAX_ORDER = 4  # CIDEr-D averages over n-grams of 1 to 4 tokens
LENGTH_SIGMA = 6.0  # tokens, of the Gaussian penalty for a length unlike the reference's
CIDER_SCALE = 10.0  # published CIDEr-D figures are ten times the mean similarity

# Unified ideographs with their extensions, compatibility ideographs, kana and hangul.
CJK = re.compile(
    "[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]"
)
WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")

NGram = tuple[str, ...]


def tokenize(text: str) -> list[str]:
    """Split `text` into the tokens that CIDEr-D and BLEU count.

    The text is NFKC-normalised (full-width letters and digits become ASCII) and lower-cased. If it
    holds any Chinese, Japanese or Korean character, every letter and digit is a token of its own:
    `穿T恤。` gives `穿 t 恤`. Otherwise every word is one, with an apostrophe or hyphen inside
    it: `A man's t-shirt .` gives `a man's t-shirt`. Punctuation, symbols and spaces are dropped.
    """
    text = unicodedata.normalize("NFKC", text).lower().replace("’", "'")
    if CJK.search(text):
        return [character for character in text if character.isalnum()]
    return WORD.findall(text)


def exact_match(answer: str, references: list[str]) -> bool:
    """Whether `answer` equals one of `references`.

    Case, full and half width, runs of whitespace, whitespace before punctuation, and punctuation at
    the end make no difference.
    """
    return _normalize(answer) in {_normalize(reference) for reference in references}


def same_items(answer: str, references: list[str]) -> bool:
    """Whether `answer` is one of `references` up to the order of the items listed after its colon.

    `图中有两个物体，从左到右是：甲、乙。` equals the same with `乙、甲`; the number named before
    the colon still counts.
    """
    return _items(answer) in [_items(reference) for reference in references]


def wrong_objects(answers: list[str], references: list[list[str]]) -> dict[str, float]:
    """Objects that descriptions name and the image does not show (CHAIR: Rohrbach et al. 2018).

    `chair_i` is the share of named objects that are wrong, `chair_s` the share of descriptions with
    a wrong one. An object is an item listed after the colon, as in `same_items`: with another
    colour, shape or size it is another object, and if it is named once more often than it is there,
    it is wrong once. Of several references, the one with the fewest wrong objects counts.
    """
    named = wrong = descriptions = 0
    for answer, group in zip(answers, references, strict=True):
        fewest = len(wrong_items(answer, group))
        named += _objects(answer).total()
        wrong += fewest
        descriptions += fewest > 0
    return {"chair_i": wrong / max(named, 1), "chair_s": descriptions / max(len(answers), 1)}


def wrong_items(answer: str, references: list[str]) -> list[str]:
    """The objects that a description names in error, as `wrong_objects` counts them."""
    objects = _objects(answer)
    wrong = (objects - _objects(reference) for reference in references)
    return [*min(wrong, key=Counter.total).elements()]


def cider_d(answers: list[list[str]], references: list[list[list[str]]]) -> float:
    """Corpus CIDEr-D (Vedantam et al. 2015) of tokenised answers, as `pycocoevalcap` gives it.

    It is the mean of `cider_d_of_each`.
    """
    return sum(cider_d_of_each(answers, references)) / len(answers)


def cider_d_of_each(answers: list[list[str]], references: list[list[list[str]]]) -> list[float]:
    """The CIDEr-D of each answer within its corpus.

    `answers[i]` is one answer's tokens, `references[i]` the tokens of each of its references.
    Document frequencies come from these references, so figures over different sets of questions are
    not comparable, and over a single question every n-gram weighs log(1/1) = 0 and the score is 0.
    The range is 0 to 10.
    """
    _check(answers, references)
    reference_counts = [
        [_count_ngrams(tokens, MAX_ORDER) for tokens in group] for group in references
    ]
    document_frequency = Counter(
        ngram for group in reference_counts for ngram in set().union(*group)
    )
    log_documents = math.log(len(references))

    def weigh(counts: Counter[NGram]) -> tuple[dict[NGram, float], list[float]]:
        weights = {
            ngram: count * (log_documents - math.log(max(1, document_frequency[ngram])))
            for ngram, count in counts.items()
        }
        squares = [0.0] * MAX_ORDER
        for ngram, weight in weights.items():
            squares[len(ngram) - 1] += weight**2
        return weights, [math.sqrt(square) for square in squares]

    scores = []
    for answer, group, group_counts in zip(answers, references, reference_counts):
        weights, norms = weigh(_count_ngrams(answer, MAX_ORDER))
        similarity = 0.0
        for reference, counts in zip(group, group_counts):
            # The reference scorer counts bigrams: nothing and one token are equally long.
            difference = max(len(answer) - 1, 0) - max(len(reference) - 1, 0)
            penalty = math.exp(-(difference**2) / (2 * LENGTH_SIGMA**2))
            similarity += penalty * _clipped_cosine(weights, norms, *weigh(counts))
        scores.append(CIDER_SCALE * similarity / len(group))
    return scores


def bleu(answers: list[list[str]], references: list[list[list[str]]], n: int = 4) -> float:
    """Corpus BLEU-`n` (Papineni et al. 2002) of tokenised answers, as `pycocoevalcap` gives it.

    The range is 0 to 1. Arguments as in `cider_d`. The brevity penalty compares each answer with
    the reference closest in length (the shorter of two equally close). There is no smoothing:
    without one matching n-gram the score is nearly 0.
    """
    _check(answers, references)
    small, tiny = 1e-9, 1e-15  # the reference scorer's guards against 0 / 0
    correct, guessed = [0] * n, [0] * n
    answer_length = reference_length = 0
    for answer, group in zip(answers, references):
        highest: Counter[NGram] = Counter()
        for reference in group:
            highest |= _count_ngrams(reference, n)
        for ngram, count in (_count_ngrams(answer, n) & highest).items():
            correct[len(ngram) - 1] += count
        for order in range(n):
            guessed[order] += max(0, len(answer) - order)
        answer_length += len(answer)
        lengths = map(len, group)
        reference_length += min((abs(length - len(answer)), length) for length in lengths)[1]
    precisions = ((right + tiny) / (all_ + small) for right, all_ in zip(correct, guessed))
    precision = math.prod(precisions) ** (1 / n)
    ratio = (answer_length + tiny) / (reference_length + small)
    return precision * (math.exp(1 - 1 / ratio) if ratio < 1 else 1.0)


def _normalize(text: str) -> str:
    text = " ".join(unicodedata.normalize("NFKC", text).lower().split())
    text = re.sub(r"\s+(?=[.,!?;:。、])", "", text)
    return text.rstrip(".,!?;:。、 ")


def _items(text: str) -> tuple[str, list[str]]:
    head, _, listed = _normalize(text).partition(":")
    return head, sorted(item.strip() for item in re.split("[、,]", listed))


def _objects(text: str) -> Counter[str]:
    return Counter(item for item in _items(text)[1] if item)


def _check(answers: list[list[str]], references: list[list[list[str]]]) -> None:
    if not answers or len(answers) != len(references):
        raise NanoVLMError(
            f"{len(answers)} answers for {len(references)} questions; "
            "give one answer a question, and at least one"
        )
    for index, group in enumerate(references):
        if not group:
            raise NanoVLMError(
                f"question {index} has no reference answer; add one or leave the question out"
            )


def _count_ngrams(tokens: list[str], longest: int) -> Counter[NGram]:
    """How often each run of 1 to `longest` tokens occurs."""
    return Counter(
        tuple(tokens[start : start + order])
        for order in range(1, longest + 1)
        for start in range(len(tokens) - order + 1)
    )


def _clipped_cosine(
    weights: dict[NGram, float],
    norms: list[float],
    reference_weights: dict[NGram, float],
    reference_norms: list[float],
) -> float:
    """The cosine for each n-gram order, averaged.

    An n-gram counts for at most its weight in the reference.
    """
    products = [0.0] * MAX_ORDER
    for ngram, weight in weights.items():
        if reference_weight := reference_weights.get(ngram):
            products[len(ngram) - 1] += min(weight, reference_weight) * reference_weight
    cosines = (
        product / (norm * reference_norm) if norm and reference_norm else 0.0
        for product, norm, reference_norm in zip(products, norms, reference_norms)
    )
    return sum(cosines) / MAX_ORDER
