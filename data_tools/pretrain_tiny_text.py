"""The tiny voice: a small Qwen3-style decoder and its SentencePiece tokenizer, taught with text alone.

Its corpus is conversations about scenes of the toy world that nobody draws. They begin with notes, in no order: the
words "big", "red", "circle", and a tally of the steps to the right and down at which the thing stands. The words of a
note are read at once, as a bag of words: their embeddings are added and take one position. Then come questions, whose
answers have to be read from the notes. So the voice knows the world's language, and how to answer from what it is told,
before it meets an image.
"""

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from sentencepiece import SentencePieceTrainer
from torch import Tensor, nn

from data_tools.pretrain_tiny_common import fit, make_all
from data_tools.scenes_text import RELATIONS, Question, questions
from data_tools.scenes_world import (
    COLOURS,
    HELD_OUT_PAIRS,
    IMAGE_SIZE,
    SHAPES,
    SIZES,
    TRAIN_PAIRS,
    Pair,
    SceneObject,
    random_scene,
)  # fmt: skip
from nanovlm.data.collate import collate
from nanovlm.data.sequences import TokenSequence, share_prefixes
from nanovlm.hub.language_configs import parse_language_model_config
from nanovlm.hub.names import QWEN, invert, translate
from nanovlm.hub.safetensors import save_file
from nanovlm.inputs.batch import Batch
from nanovlm.inputs.chat import IMAGE, Chat, ChatConfig, ImageTokens, Message
from nanovlm.model.language_model import LanguageModel
from nanovlm.tokenizer import SentencePieceTokenizer
from nanovlm.utils.files import write_json

STEPS = (
    16  # from side to side: objects lie more than one apart where it is asked which is further left
)
RIGHT, DOWN = "→", "↓"
TOKENIZER_TEXTS = 5000  # enough to count pieces in
SPECIAL = ("<image>", "<system>", "<user>", "<assistant>")
EMPTY = "空"  # a note that there is nothing to note
# Asked more often: a comparison has two notes to find and a place in each, the others one word of one note among many.
HARD = (*RELATIONS, "colour", "exists")
BRANCHES = 4  # conversations in a row: notes are short, and what attention costs grows with the square of a row
HUB_CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 640, "hidden_size": 192,
    "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 48, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True, "attention_bias": False, "use_sliding_window": False, "torch_dtype": "bfloat16",
}  # fmt: skip


@dataclass
class Text:
    """Notes, each a few words, and conversations that begin with them, at the place where an image could be."""

    notes: list[tuple[str, ...]]
    conversations: list[list[Message]]

    @classmethod
    def random(
        cls, rng: Random, pairs: Sequence[Pair] = TRAIN_PAIRS, drill: bool = False
    ) -> "Text":
        """Notes of a random scene, some repeated, some saying "empty"; conversations of one to three questions.

        A drill asks mostly for comparisons that are answered with a word of direction or size, or yes or no.
        """
        scene = random_scene(rng, pairs)
        notes = [_note(thing) for thing in scene.objects for _ in range(rng.randint(1, 4))]
        notes += [(EMPTY,)] * rng.randint(0, len(notes))
        rng.shuffle(notes)
        more = [
            question for _ in range(7 if drill else 3) for question in questions(scene, rng, pairs)
        ]
        asked = questions(scene, rng, pairs) + [
            question for question in more if _is_hard(question, drill)
        ]
        conversations: list[list[Message]] = []
        rng.shuffle(asked)
        for question in asked:
            if not conversations or len(conversations[-1]) == 6 or rng.random() < 0.7:
                conversations.append([])
            content = (question.text,) if conversations[-1] else (IMAGE, f"\n{question.text}")
            conversations[-1] += [
                Message("user", content),
                Message("assistant", (question.answer,)),
            ]
        return cls(notes, conversations)


def _is_hard(question: Question, drill: bool) -> bool:
    """Of the hardest kinds; for a drill, a comparison whose answer names no object."""
    if drill:
        return question.kind in RELATIONS and not any(
            shape in question.answer for names in SHAPES.items() for shape in names
        )
    return question.kind in HARD


def _note(thing: SceneObject) -> tuple[str, ...]:
    """Its words. A tally, unlike a number, grows with what it counts: so does its part of the sum of embeddings."""
    right, down = (int(place * STEPS / IMAGE_SIZE) for place in (thing.x, thing.y))
    return (
        SIZES[thing.size],
        COLOURS[thing.colour],
        SHAPES[thing.shape],
        *[RIGHT] * right,
        *[DOWN] * down,
    )


def _seeded_text(pairs: Sequence[Pair], name: str, index: int, drill: bool = False) -> Text:
    return Text.random(Random(f"{name}/{index}"), pairs, drill)


_NAMES = re.compile(
    "(" + "|".join(f" ?{word}" for table in (COLOURS, SHAPES, SIZES) for pair in table.items() for word in pair)
    + r"| ?\d+)", re.IGNORECASE)  # fmt: skip
BOUNDARY = "\t"


def train_tokenizer(corpus: list[Text]) -> SentencePieceTokenizer:
    """Byte-pair pieces of the corpus. Deterministic: one thread, no sampling, nothing normalised away.

    The names of colours, shapes and sizes, and numbers, are cut out by a boundary that no piece crosses, so that a
    colour never sticks to a shape: pairs that were held out are spelled with the same pieces as all others.
    """
    lines = [word for text in corpus for note in text.notes for word in note]
    lines += [
        part
        for text in corpus
        for messages in text.conversations
        for message in messages
        for part in message.content
        if part is not IMAGE
    ]
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=(_NAMES.sub(rf"{BOUNDARY}\1{BOUNDARY}", line) for line in lines), model_writer=model,
        model_type="bpe", vocab_size=HUB_CONFIG["vocab_size"], byte_fallback=True, character_coverage=1.0,
        num_threads=1, control_symbols=list(SPECIAL), unk_id=0, eos_id=1, bos_id=-1, pad_id=-1,
        pretokenization_delimiter=BOUNDARY,
        add_dummy_prefix=False, remove_extra_whitespaces=False, normalization_rule_name="identity",
        max_sentence_length=16384, minloglevel=2,
    )  # fmt: skip
    return SentencePieceTokenizer(model.getvalue())


class Corpus:
    """Texts as rows of tokens, a few conversations of each side by side behind its notes, and batches of them."""

    def __init__(self, texts: list[Text], chat: Chat) -> None:
        self.chat, encode = chat, lru_cache(chat.tokenizer.encode)
        self.rows, self.notes = [], []
        for text in texts:
            samples = [
                TokenSequence.of(chat.encode(messages, [ImageTokens(len(text.notes))]))
                for messages in text.conversations
            ]
            rows = share_prefixes(samples, chat.image_token_id, BRANCHES)
            self.rows += rows
            self.notes += [
                [[id for word in note for id in encode(word)] for note in text.notes]
            ] * len(rows)

    def batches(self, size: int, rng: Random) -> Iterator[tuple[Batch, list[list[int]]]]:
        """Endless batches of rows of like length, with their notes' words."""
        while True:
            order = rng.sample(range(len(self.rows)), len(self.rows))
            for start in range(0, len(order), 32 * size):
                block = sorted(
                    order[start : start + 32 * size],
                    key=lambda index: len(self.rows[index].input_ids),
                )
                groups = [block[first : first + size] for first in range(0, len(block), size)]
                yield from map(self.batch, rng.sample(groups, len(groups)))

    def batch(self, chosen: Sequence[int]) -> tuple[Batch, list[list[int]]]:
        """The rows with these numbers, and the words of all their notes."""
        rows = collate([self.rows[index] for index in chosen], self.chat.image_token_id)
        return rows, [note for index in chosen for note in self.notes[index]]


def target_logits(decoder: LanguageModel, batch: Batch, notes: list[list[int]]) -> Tensor:
    """(M, V) where a token is to be predicted. A note's embedding is the sum of its words'."""
    starts = torch.tensor([0, *map(len, notes)]).cumsum(0)[:-1]
    words = torch.tensor([id for note in notes for id in note])
    bags = F.embedding_bag(words, decoder.embed_tokens.weight, starts, mode="sum")
    embeddings = decoder.embed_tokens(batch.input_ids)
    embeddings = (
        embeddings.flatten(0, 1).index_copy(0, batch.image_positions, bags).view_as(embeddings)
    )
    hidden_states = decoder.hidden_states(embeddings, batch.attention_mask)
    return decoder.logits(hidden_states.flatten(0, 1)[batch.target_positions])


@torch.no_grad()
def exact_answers(decoder: LanguageModel, corpus: Corpus) -> float:
    """The share of answers whose every token is the likeliest one, given what stands before it."""
    wrong = asked = 0
    for index in range(len(corpus.rows)):
        batch, notes = corpus.batch([index])
        ends = batch.targets == corpus.chat.end_of_turn_id
        answer = (
            ends.cumsum(0) - ends.long()
        )  # the number of the answer that each target belongs to
        wrong += len(
            answer[target_logits(decoder, batch, notes).argmax(-1) != batch.targets].unique()
        )
        asked += int(ends.sum())
    return 1 - wrong / asked


def pretrain_text(
    folder: Path, seed: int, steps: int, drill_steps: int, texts: int, batch_size: int = 40
) -> dict[str, dict[str, float]]:
    """Train tokenizer and voice, write them in Qwen3's hub layout, and return the shares of exact answers.

    The voice first learns from all kinds of questions, then from drills. Among everything else the hardest comparisons
    stay where guessing is; once most of what it reads are those, it learns them within some 2,000 steps.
    """
    name = f"pretrain/{seed}"
    made = list(make_all(partial(_seeded_text, TRAIN_PAIRS, name), texts, "texts"))
    drills = list(
        make_all(
            partial(_seeded_text, TRAIN_PAIRS, f"{name}/drill", drill=True),
            -(-texts // 3),
            "drills",
        )
    )
    tokenizer = train_tokenizer(made[:TOKENIZER_TEXTS])
    chat = Chat(ChatConfig(template="plain", image_token="<image>"), tokenizer)
    torch.manual_seed(seed)
    decoder = LanguageModel(parse_language_model_config(HUB_CONFIG))
    for parameter in decoder.parameters():
        if (
            parameter.dim() == 2
        ):  # the usual 0.02 suits widths of about a thousand; here it would lie long on a plateau
            nn.init.normal_(parameter, std=HUB_CONFIG["hidden_size"] ** -0.5)

    def learn(corpus: Corpus, steps: int, peak_lr: float, title: str) -> None:
        stream = corpus.batches(batch_size, Random(seed))

        def loss_of_step(step: int) -> Tensor:
            batch, notes = next(stream)
            with torch.autocast("cpu", torch.bfloat16):
                logits = target_logits(decoder, batch, notes)
            return F.cross_entropy(logits.float(), batch.targets)

        fit(list(decoder.parameters()), loss_of_step, steps, peak_lr, title)

    learn(Corpus(made, chat), steps, 3e-3, "voice")
    learn(Corpus(drills, chat), drill_steps, 2e-3, "voice, drills")
    decoder.eval().bfloat16().float()  # measured as it will be stored
    result = {}
    for split, pairs in (("seen pairs", TRAIN_PAIRS), ("held-out pairs", HELD_OUT_PAIRS)):
        unseen = [
            _seeded_text(pairs, f"pretrain/{seed}/{split}", index)
            for index in range(min(400, texts))
        ]
        result[split] = {"answers": exact_answers(decoder, Corpus(unseen, chat))}
    _save(decoder, tokenizer, folder)
    return result


def _save(decoder: LanguageModel, tokenizer: SentencePieceTokenizer, folder: Path) -> None:
    """Write `config.json`, the tokenizer files and `model.safetensors` under Qwen3's names."""
    folder.mkdir(parents=True, exist_ok=True)
    config = HUB_CONFIG | {"eos_token_id": tokenizer.special_tokens["</s>"], "bos_token_id": None}
    write_json(folder / "config.json", config)
    tokenizer.save(folder)
    published = translate(invert(QWEN))
    save_file({published(name): tensor.detach().bfloat16() for name, tensor in decoder.state_dict().items()},
              folder / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
