"""The whole model: an image becomes visual tokens among the words, which the language model reads.

    pixels (N, 3, H, W) ─ vision_encoder ─▶ (N, P, C_v) ─ projector ─▶ visual tokens (N, K, C_t)
                                                                             │
    input_ids (B, T) ─ embed_tokens ─▶ words (B, T, C_t) ◀────── splice ─────┘
                                         └─ language_model ─▶ (M, C) ─▶ loss

The ids hold K placeholders for each of the N tiles; M of all B · T positions have a label.

Lesson: lessons/source/09_splice.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nanovlm.errors import NanoVLMError
from nanovlm.inputs.batch import Batch
from nanovlm.inputs.chat import Chat, ChatConfig, ImageTokens
from nanovlm.inputs.image import tile_grid
from nanovlm.inputs.image_config import ImageConfig
from nanovlm.model.language_model import LanguageModel, LanguageModelConfig
from nanovlm.model.loss import chunked_cross_entropy
from nanovlm.model.moe import take_balance_loss
from nanovlm.model.projector import ProjectorConfig, build_projector
from nanovlm.model.vision_encoder import VisionEncoder, VisionEncoderConfig
from nanovlm.tokenizer import Tokenizer
from nanovlm.utils.config import check_numbers

TILES_AT_ONCE = 32  # in inference mode: 32 questions about images in tiles may bring 544
LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden states, head, targets → loss


@dataclass(frozen=True)
class VLMConfig:
    """The settings of all parts, and how they are joined."""

    vision_encoder: VisionEncoderConfig
    language_model: LanguageModelConfig
    projector: ProjectorConfig
    image: ImageConfig
    chat: ChatConfig
    vision_layer: int = -1  # whose patch vectors the projector gets (`VisionEncoder.patches`)
    vision_norm: bool = True  # whether they pass the vision encoder's final norm; layer -1 alone
    bidirectional_images: bool = False  # visual tokens of one image attend to each other both ways
    vision_first_token: int | None = None  # the first that the projector gets; None: a patch's

    def __post_init__(self) -> None:
        check_numbers(self)

    @property
    def feature_shape(self) -> tuple[int, int]:
        """(P, C_v) of a tile's patch vectors that the projector gets."""
        size = self.image.height, self.image.width
        return self.vision_encoder.feature_shape(*size, *self.which_features)

    @property
    def which_features(self) -> tuple[int, bool, int | None]:
        """Layer, norm and first token, as `VisionEncoder.patches` takes them."""
        return self.vision_layer, self.vision_norm, self.vision_first_token

    @property
    def vision_depth(self) -> int:
        """Blocks of the vision encoder that run: those below `vision_layer`."""
        return self.vision_encoder.blocks_below(self.vision_layer)


class VisionLanguageModel(nn.Module):
    """Vision encoder, projector, and language model with its tokenizer and chat template."""

    def __init__(self, config: VLMConfig, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.config, self.tokenizer, self.chat = config, tokenizer, Chat(config.chat, tokenizer)
        language, image = config.language_model, config.image
        self._check_vocabulary()
        self.vision_encoder = VisionEncoder(config.vision_encoder)
        num_patches, vision_width = config.feature_shape
        self.projector = build_projector(config.projector, vision_width, language.input_size)
        self.language_model = LanguageModel(language)
        self.image_length = self.projector.num_tokens(num_patches)  # K, visual tokens of a tile
        self.max_image_length = self.image_length * image.max_tiles_per_image  # of a whole image
        if self.max_image_length >= language.max_position_embeddings:
            raise NanoVLMError(
                f"an image takes up to {self.max_image_length} visual tokens, which leave no room "
                f"for words among the language model's {language.max_position_embeddings} "
                "positions; take a projector that makes fewer, a smaller image or fewer tiles"
            )

    def forward(self, batch: Batch, loss_function: LossFunction | None = None) -> Tensor:
        """The summed loss over `batch.targets`, a scalar in fp32.

        `loss_function` replaces the cross entropy: it gets hidden states (M, C), head (V, C) and
        targets (M,), and its result is returned. Only labelled positions pass the output head.
        """
        visual_tokens = self.encode_images(batch)  # (N, K, C_t)
        embeddings = self.splice(batch, visual_tokens)  # (B, T, C_t)
        hidden_states = self.language_model.hidden_states(
            embeddings,
            batch.attention_mask,
            positions=batch.target_positions,
            groups=self.image_groups(batch),
            right_padded=batch.right_padded,
        )  # (M, C)
        head = self.language_model.head_weight
        loss = (loss_function or chunked_cross_entropy)(hidden_states, head, batch.targets)
        if self.config.language_model.num_experts:
            balance_loss = take_balance_loss(self.language_model)
            if balance_loss is not None and loss_function is None:
                loss = loss + self._weigh(balance_loss, batch)
        return loss

    def encode_images(self, batch: Batch) -> Tensor | None:
        """The batch's visual tokens, (N, K, C_t); None where it has no images."""
        self._check_placeholders(batch)
        patches = batch.patches
        if patches is None and batch.pixels is not None:
            patches = self.vision_features(batch.pixels)  # (N, P, C_v)
        return None if patches is None else self.projector(patches)

    def splice(self, batch: Batch, visual_tokens: Tensor | None) -> Tensor:
        """Word embeddings with the visual tokens in their places: (B, T, C_t)."""
        # The placeholder's id may lie outside the embedding table: id 0 is looked up instead.
        words = batch.input_ids.flatten().index_fill(0, batch.image_positions, 0)
        embeddings = self.language_model.embed_tokens(words)  # (B · T, C_t)
        if torch.is_autocast_enabled(embeddings.device.type):  # for the whole residual stream
            embeddings = embeddings.to(torch.get_autocast_dtype(embeddings.device.type))
        if visual_tokens is not None:
            visual_tokens = visual_tokens.flatten(0, 1).to(embeddings.dtype)  # (N · K, C_t)
            embeddings = embeddings.index_copy(0, batch.image_positions, visual_tokens)
        return embeddings.view(*batch.input_ids.shape, embeddings.shape[-1])

    def embed(self, batch: Batch) -> Tensor:
        """What the language model reads: word embeddings and visual tokens, (B, T, C_t)."""
        return self.splice(batch, self.encode_images(batch))

    def vision_features(self, pixels: Tensor) -> Tensor:
        """The patch vectors that the projector gets: (N, 3, H, W) → (N, P, C_v)."""
        pixels = pixels.to(self.vision_encoder.patch_embedding.weight.dtype)
        which = self.config.which_features
        if not torch.is_inference_mode_enabled() or len(pixels) <= TILES_AT_ONCE:
            return self.vision_encoder.patches(pixels, *which)
        parts = pixels.split(TILES_AT_ONCE)
        return torch.cat([self.vision_encoder.patches(part, *which) for part in parts])

    def image_groups(self, batch: Batch) -> Tensor | None:
        """Which tokens attend to each other both ways, (B, T); None where none do.

        k + 1 for the visual tokens of tile k of the batch, 0 for words.
        """
        if not self.config.bidirectional_images or not len(batch.image_positions):
            return None
        places = torch.arange(len(batch.image_positions), device=batch.input_ids.device)
        groups = torch.zeros_like(batch.input_ids).flatten()
        groups.index_copy_(0, batch.image_positions, places // self.image_length + 1)
        return groups.view_as(batch.input_ids)

    def image_tokens(self, width: int, height: int) -> ImageTokens:
        """The placeholders of an image of this size, as `chat.encode` takes them."""
        return ImageTokens(self.image_length, *tile_grid(width, height, self.config.image))

    def _weigh(self, balance_loss: Tensor, batch: Batch) -> Tensor:
        """The experts' load-balance loss as a part of the summed loss.

        It is multiplied by the number of targets, so that, divided by all targets of a step, it is
        a mean. Unlike the rest, it is not exactly the same for k small batches and a large one,
        because the load of experts is counted within a batch.
        """
        return self.config.language_model.balance_loss * len(batch.targets) * balance_loss

    def _check_placeholders(self, batch: Batch) -> None:
        images = batch.pixels if batch.patches is None else batch.patches
        tiles = 0 if images is None else len(images)
        if len(batch.image_positions) != tiles * self.image_length:
            raise NanoVLMError(
                f"the text has {len(batch.image_positions)} image placeholders, and {tiles} tiles "
                f"of {self.image_length} visual tokens fill {tiles * self.image_length}; "
                "they have to be equal"
            )

    def _check_vocabulary(self) -> None:
        tokens, rows = self.tokenizer.vocab_size, self.config.language_model.vocab_size
        placeholder_is_last = self.chat.image_token_id == tokens - 1  # it needs no row, as in LLaVA
        if tokens - placeholder_is_last > rows:
            raise NanoVLMError(
                f"the tokenizer has {tokens} tokens and the language model {rows}; "
                "they do not belong together"
            )
