"""Beam search: several beginnings of an answer are written side by side, and the best one wins.

The likeliest token need not begin the likeliest answer. So each row keeps its `beams` likeliest
beginnings, adds every token to each, and keeps the likeliest of these (Graves 2012, Sutskever et
al. 2014). Here is the bookkeeping: which beginnings go on, which have ended, and when no better
answer can come. `generate.search` runs the model in between.

Lesson: lessons/source/10_generation.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class Beams:
    """The beginnings of B rows that go on, and the best answers that have ended, K of each a row.

    An answer of n tokens, the end token included, scores log p / n^length_penalty, its log
    probability divided by a power of its length: at 1 the mean of a token (Graves 2012), at 0 the
    sum, which favours short answers; above 1 long answers gain, below 0 short ones do. (Wu et al.
    2016 divide by ((5 + n) / 6)^α.)

    The rules are those of `generate(early_stopping=False)` in transformers 5. An answer counts when
    its end token is among the K likeliest continuations. A row is done when K answers have ended
    and the likeliest beginning, at the length it has now, would not score more than the worst of
    them. With a penalty above 0 that is a guess: a longer answer might still have won.
    """

    def __init__(self, rows: int, beams: int, stops: Tensor, length_penalty: float) -> None:
        """`stops` are the ids of the end tokens, (n,); it is on the device of the logits."""
        self.stops, self.length_penalty = stops, length_penalty
        self.ids = torch.empty(rows, beams, 0, dtype=torch.int64, device=stops.device)
        # All beginnings are empty. One of them counts, or each would be written K times.
        self.scores = torch.full((rows, beams), -torch.inf, device=stops.device)  # log p
        self.scores[:, 0] = 0
        self.ended_ids = self.ids  # (B, K, n), -1 after the end
        self.ended_scores = torch.full_like(self.scores, -torch.inf)  # best first; -∞: none yet
        self.going_on = torch.ones(rows, 1, dtype=torch.bool, device=stops.device)

    def advance(self, log_probs: Tensor, is_last: bool = False) -> Tensor:
        """Add a token to each beginning, given the log probabilities of the next, (B · K, V).

        Returns which of the B · K beginnings each of the new ones goes on from, (B · K,);
        `ids[..., -1]` are the new tokens. With `is_last`, all answers end here.
        """
        rows, beams = self.scores.shape
        totals = (self.scores.view(-1, 1) + log_probs).view(rows, -1)  # (B, K · V)
        # Each beginning may be followed by all end tokens, and K have to be left that go on.
        count = min(beams * (1 + len(self.stops)), totals.shape[1])
        totals, index = totals.topk(count)  # (B, count), likeliest first
        parents, tokens = index // log_probs.shape[1], index % log_probs.shape[1]
        ids = torch.cat((_take(self.ids, parents), tokens[..., None]), dim=-1)  # (B, count, n)
        ends = torch.isin(tokens, self.stops) | is_last

        allowed = (ends & self.going_on)[:, :beams]
        scores = totals[:, :beams] / ids.shape[-1] ** self.length_penalty
        self._keep_ended(ids[:, :beams], scores.masked_fill(~allowed, -torch.inf))

        self.scores, best = totals.masked_fill(ends, -torch.inf).topk(beams)
        self.ids, parents = _take(ids, best), parents.gather(1, best)
        hoped = self.scores[:, :1] / ids.shape[-1] ** self.length_penalty
        self.going_on &= hoped > self.ended_scores[:, -1:]
        return (parents + torch.arange(rows, device=parents.device)[:, None] * beams).flatten()

    def _keep_ended(self, ids: Tensor, scores: Tensor) -> None:
        """The best K of those that have ended and of these, (B, K, n) and (B, K)."""
        ids = torch.cat((F.pad(self.ended_ids, (0, 1), value=-1), ids), dim=1)
        scores = torch.cat((self.ended_scores, scores), dim=1)
        self.ended_scores, best = scores.topk(self.scores.shape[1])
        self.ended_ids = _take(ids, best)

    def answers(self) -> list[list[tuple[list[int], float]]]:
        """Of each row the answers that have ended, best first: ids without end token, and score."""
        stops = {-1, *self.stops.tolist()}
        return [
            [
                ([token for token in ids if token not in stops], score)
                for ids, score in zip(row_ids, row_scores)
                if score > -torch.inf
            ]
            for row_ids, row_scores in zip(self.ended_ids.tolist(), self.ended_scores.tolist())
        ]


def _take(ids: Tensor, index: Tensor) -> Tensor:
    """Of each row those at `index`: (B, K, n) and (B, m) → (B, m, n)."""
    return ids.gather(1, index[..., None].expand(-1, -1, ids.shape[-1]))
