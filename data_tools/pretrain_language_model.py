"""Pretraining of the tiny language model (Qwen3's layout) and its tokenizer, on text alone.

The corpus is conversations about scenes of the toy world that are never drawn. A conversation
begins with notes in random order, one for each object: the words "big", "red", "circle", and a
tally of steps to the right and down for its position. A note is a bag of words: their embeddings
are added and take one position in the sequence. Questions follow, with answers that have to be
read from the notes. So the language model knows the language of the toy world, and can answer from
a context, before it is given images.
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

from data_tools.pretrain_common import fit, make_all
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
)
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

# Steps from side to side. Objects lie more than one apart where a question compares positions.
STEPS = 16
RIGHT, DOWN = "→", "↓"
TOKENIZER_TEXTS = 5000  # enough to train the tokenizer on
SPECIAL = ("<image>", "<system>", "<user>", "<assistant>")
EMPTY = "空"  # the note of an empty place
# Asked more often, being harder: a comparison needs a word from each of two notes, the others one
# word from one note among many.
HARD = (*RELATIONS, "colour", "exists")
# Conversations packed into a sequence: attention costs grow with the square of its length.
BRANCHES = 4
HUB_CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 640,
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
}


@dataclass
class Text:
    """Notes, each a few words, and conversations that have them in the place of an image."""

    notes: list[tuple[str, ...]]
    conversations: list[list[Message]]

    @classmethod
    def random(
        cls, rng: Random, pairs: Sequence[Pair] = TRAIN_PAIRS, drill: bool = False
    ) -> "Text":
        """Notes of a random scene, some repeated, some empty; one to three questions each time.

        A drill consists mostly of comparisons that are answered with a direction, a size, yes or
        no.
        """
        scene = random_scene(rng, pairs)
        notes = [_note(thing) for thing in scene.objects for _ in range(rng.randint(1, 4))]
        notes += [(EMPTY,)] * rng.randint(0, len(notes))
        rng.shuffle(notes)
        more = [one for _ in range(7 if drill else 3) for one in questions(scene, rng, pairs)]
        asked = questions(scene, rng, pairs)
        asked += [question for question in more if _is_hard(question, drill)]
        conversations: list[list[Message]] = []
        rng.shuffle(asked)
        for question in asked:
            if not conversations or len(conversations[-1]) == 6 or rng.random() < 0.7:
                conversations.append([])
            content = (question.text,) if conversations[-1] else (IMAGE, f"\n{question.text}")
            answer = Message("assistant", (question.answer,))
            conversations[-1] += [Message("user", content), answer]
        return cls(notes, conversations)


def _is_hard(question: Question, drill: bool) -> bool:
    """Whether it is of a hard kind; for a drill, a comparison whose answer names no object."""
    if not drill:
        return question.kind in HARD
    shapes = [*SHAPES.keys(), *SHAPES.values()]
    return question.kind in RELATIONS and not any(shape in question.answer for shape in shapes)


def _note(thing: SceneObject) -> tuple[str, ...]:
    """The words of an object. A tally adds more to the sum of embeddings, the more it counts."""
    right, down = (int(place * STEPS / IMAGE_SIZE) for place in (thing.x, thing.y))
    names = SIZES[thing.size], COLOURS[thing.colour], SHAPES[thing.shape]
    return (*names, *[RIGHT] * right, *[DOWN] * down)


def _seeded_text(pairs: Sequence[Pair], name: str, index: int, drill: bool = False) -> Text:
    return Text.random(Random(f"{name}/{index}"), pairs, drill)


_WORDS = [word for table in (COLOURS, SHAPES, SIZES) for pair in table.items() for word in pair]
_NAMES = re.compile("(" + "|".join(f" ?{word}" for word in _WORDS) + r"| ?\d+)", re.IGNORECASE)
BOUNDARY = "\t"


def train_tokenizer(corpus: list[Text]) -> SentencePieceTokenizer:
    """Train a byte-pair SentencePiece model: deterministic, without normalization.

    No piece crosses the boundary of a name (colour, shape, size) or a number. So a piece never
    joins a colour to a shape, and held-out pairs are spelled with the same pieces as all others.
    """
    lines = [word for text in corpus for note in text.notes for word in note]
    for text in corpus:
        for messages in text.conversations:
            for message in messages:
                lines += [part for part in message.content if isinstance(part, str)]
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=(_NAMES.sub(rf"{BOUNDARY}\1{BOUNDARY}", line) for line in lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=HUB_CONFIG["vocab_size"],
        byte_fallback=True,
        character_coverage=1.0,
        num_threads=1,
        control_symbols=list(SPECIAL),
        unk_id=0,
        eos_id=1,
        bos_id=-1,
        pad_id=-1,
        pretokenization_delimiter=BOUNDARY,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        max_sentence_length=16384,
        minloglevel=2,
    )
    return SentencePieceTokenizer(model.getvalue())


class Corpus:
    """Texts as sequences of tokens, and batches of them.

    A sequence holds a text's notes once and a few of its conversations behind them, side by side.
    """

    def __init__(self, texts: list[Text], chat: Chat) -> None:
        self.chat, encode = chat, lru_cache(chat.tokenizer.encode)
        self.sequences, self.notes = [], []
        for text in texts:
            notes = [[id for word in note for id in encode(word)] for note in text.notes]
            slots = [ImageTokens(len(notes))]
            alone = [
                TokenSequence.of(chat.encode(messages, slots)) for messages in text.conversations
            ]
            shared = share_prefixes(alone, chat.image_token_id, BRANCHES)
            self.sequences += shared
            self.notes += [notes] * len(shared)

    def batches(self, size: int, rng: Random) -> Iterator[tuple[Batch, list[list[int]]]]:
        """Endless batches of sequences of similar length, with the words of their notes."""
        while True:
            order = rng.sample(range(len(self.sequences)), len(self.sequences))
            for start in range(0, len(order), 32 * size):
                block = order[start : start + 32 * size]
                block.sort(key=lambda index: len(self.sequences[index].input_ids))
                groups = [block[first : first + size] for first in range(0, len(block), size)]
                yield from map(self.batch, rng.sample(groups, len(groups)))

    def batch(self, chosen: Sequence[int]) -> tuple[Batch, list[list[int]]]:
        """The sequences with these numbers, and the words of all their notes."""
        batch = collate([self.sequences[index] for index in chosen], self.chat.image_token_id)
        return batch, [note for index in chosen for note in self.notes[index]]


def target_logits(model: LanguageModel, batch: Batch, notes: list[list[int]]) -> Tensor:
    """Logits (M, V) at the M positions with a target.

    The embedding of a note is the sum of its words' embeddings.
    """
    starts = torch.tensor([0, *map(len, notes)]).cumsum(0)[:-1]
    words = torch.tensor([id for note in notes for id in note])
    note_embeddings = F.embedding_bag(words, model.embed_tokens.weight, starts, mode="sum")
    embeddings = model.embed_tokens(batch.input_ids)  # (B, T, C)
    spliced = embeddings.flatten(0, 1).index_copy(0, batch.image_positions, note_embeddings)
    hidden_states = model.hidden_states(spliced.view_as(embeddings), batch.attention_mask)
    return model.logits(hidden_states.flatten(0, 1)[batch.target_positions])


@torch.no_grad()
def exact_answers(model: LanguageModel, corpus: Corpus) -> float:
    """The share of answers of which greedy decoding gets every token right (teacher forcing)."""
    wrong = total = 0
    for index in range(len(corpus.sequences)):
        batch, notes = corpus.batch([index])
        ends = batch.targets == corpus.chat.end_of_turn_id
        answer_numbers = ends.cumsum(0) - ends.long()  # of the answer that each target belongs to
        predicted = target_logits(model, batch, notes).argmax(-1)
        wrong += len(answer_numbers[predicted != batch.targets].unique())
        total += int(ends.sum())
    return 1 - wrong / total


def pretrain_language_model(
    folder: Path, seed: int, steps: tuple[int, int, int], texts: int, batch_size: int = 40
) -> dict[str, dict[str, float]]:
    """Train tokenizer and language model and write them in Qwen3's hub layout.

    `steps` are those of the three phases: all kinds of questions, drills, and both in turn. In the
    full mixture, answers to the hardest comparisons stay at chance; once most of the data is
    comparisons, they are learned within about 2,000 steps. Meanwhile the other kinds become worse,
    which the last phase repairs. Returns the shares of exact answers.
    """
    name = f"pretrain/{seed}"
    make_text = partial(_seeded_text, TRAIN_PAIRS, name)
    make_drill = partial(_seeded_text, TRAIN_PAIRS, f"{name}/drill", drill=True)
    made = list(make_all(make_text, texts, "texts"))
    drills = list(make_all(make_drill, -(-texts // 3), "drills"))
    tokenizer = train_tokenizer(made[:TOKENIZER_TEXTS])
    chat = Chat(ChatConfig(template="plain", image_token="<image>"), tokenizer)
    torch.manual_seed(seed)
    model = LanguageModel(parse_language_model_config(HUB_CONFIG))
    for parameter in model.parameters():
        # The usual 0.02 suits widths of about a thousand; at this one, training would plateau.
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=HUB_CONFIG["hidden_size"] ** -0.5)

    def train(corpora: list[Corpus], steps: int, peak_lr: float, title: str) -> None:
        streams = [corpus.batches(batch_size, Random(seed)) for corpus in corpora]

        def loss_of_step(step: int) -> Tensor:
            batch, notes = next(streams[step % len(streams)])
            with torch.autocast("cpu", torch.bfloat16):
                logits = target_logits(model, batch, notes)
            return F.cross_entropy(logits.float(), batch.targets)

        fit(list(model.parameters()), loss_of_step, steps, peak_lr, title)

    mixture, comparisons = Corpus(made, chat), Corpus(drills, chat)
    train([mixture], steps[0], 3e-3, "language model")
    train([comparisons], steps[1], 2e-3, "language model, drills")
    train([mixture, comparisons], steps[2], 1.5e-3, "language model, both in turn")
    model.eval().bfloat16().float()  # measured as it will be stored
    result = {}
    for split, pairs in (("seen pairs", TRAIN_PAIRS), ("held-out pairs", HELD_OUT_PAIRS)):
        make_unseen = partial(_seeded_text, pairs, f"{name}/{split}")
        unseen = list(map(make_unseen, range(min(400, texts))))
        result[split] = {"answers": exact_answers(model, Corpus(unseen, chat))}
    _save(model, tokenizer, folder)
    return result


def _save(model: LanguageModel, tokenizer: SentencePieceTokenizer, folder: Path) -> None:
    """Write `config.json`, the tokenizer files and `model.safetensors` under Qwen3's names."""
    folder.mkdir(parents=True, exist_ok=True)
    config = HUB_CONFIG | {"eos_token_id": tokenizer.special_tokens["</s>"], "bos_token_id": None}
    write_json(folder / "config.json", config)
    tokenizer.save(folder)
    published = translate(invert(QWEN))
    state = model.state_dict()
    tensors = {str(published(name)): tensor.detach().bfloat16() for name, tensor in state.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
