"""The whole model in one place: an image's patches become tokens among the words, and the decoder reads on.

pixels (N, 3, H, W) ─ vision ─▶ patches (N, P, C_v) ─ projector ─▶ visual tokens (N, K, C_t)
input_ids (B, T), K placeholders an image ─ embedding ─▶ (B, T, C_t) ◀─ spliced in ─┘ ─ decoder ─▶ loss | next token
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
from nanovlm.model.projector import ProjectorConfig, build_projector
from nanovlm.model.vision_encoder import VisionEncoder, VisionEncoderConfig
from nanovlm.tokenizer import Tokenizer

TILES_AT_ONCE = 32  # that the eyes see when a model answers


@dataclass(frozen=True)
class VLMConfig:
    """All parts' settings, and the layer whose patch vectors are looked at (`VisionEncoder.patches`)."""

    vision_encoder: VisionEncoderConfig
    language_model: LanguageModelConfig
    projector: ProjectorConfig
    image: ImageConfig
    chat: ChatConfig
    vision_layer: int = -1
    bidirectional_images: bool = (
        False  # visual tokens of one image see each other both ways; text is causal all the same
    )


class VisionLanguageModel(nn.Module):
    """PublishedVisionEncoder, projector and voice. `tokenizer` and `chat` belong to the voice and travel with it."""

    def __init__(self, config: VLMConfig, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.config, self.tokenizer, self.chat = config, tokenizer, Chat(config.chat, tokenizer)
        # Nobody looks up the placeholder, so it may lie behind the decoder's last row (LLaVA's does).
        placeholder_is_last = self.chat.image_token_id == tokenizer.vocab_size - 1
        if tokenizer.vocab_size - placeholder_is_last > config.language_model.vocab_size:
            raise NanoVLMError(
                f"the tokenizer knows {tokenizer.vocab_size} tokens and the decoder {config.language_model.vocab_size}; "
                "they do not belong together"
            )
        self.vision_encoder = VisionEncoder(config.vision_encoder)
        self.projector = build_projector(
            config.projector,
            config.vision_encoder.feature_size(config.vision_layer),
            config.language_model.input_size,
        )
        self.language_model = LanguageModel(config.language_model)
        self.image_length = (
            self.projector.num_tokens(  # K, placeholder tokens that each picture of an image takes
                config.vision_encoder.num_features(
                    config.image.height, config.image.width, config.vision_layer
                )
            )
        )
        self.max_image_length = (
            self.image_length * config.image.max_tiles_per_image
        )  # of the image that is cut into most tiles
        if self.max_image_length >= config.language_model.max_position_embeddings:
            raise NanoVLMError(
                f"an image takes up to {self.max_image_length} visual tokens, which leave no room for words among "
                f"the decoder's {config.language_model.max_position_embeddings} positions; take a projector that makes fewer, "
                "a smaller image or fewer tiles"
            )

    def forward(
        self, batch: Batch, loss_function: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    ) -> Tensor:
        """The summed loss over `batch.targets`, a scalar in fp32; or what `loss_function` makes of the same three: hidden
        states (M, C), head (V, C) and targets (M,). Only positions with a label pass the output head.

        In training, the decoder's experts add their load-balance losses to that loss, times the number of targets: divided
        by all of a step's targets, they are a mean weighted by tokens. Of k batches and one k times as large, the rest of
        the loss is exactly the same and this term on average: how busy experts are is counted within a batch.
        """
        balance: list[Tensor] = []
        hidden_states = self.language_model.hidden_states(
            self.embed(batch),
            batch.attention_mask,
            positions=batch.target_positions,
            groups=self.image_groups(batch),
            balance=balance,
        )
        if loss_function is not None:
            return loss_function(hidden_states, self.language_model.head_weight, batch.targets)
        loss = chunked_cross_entropy(hidden_states, self.language_model.head_weight, batch.targets)
        if balance:
            loss = (
                loss
                + self.config.language_model.balance_loss
                * len(batch.targets)
                * torch.stack(balance).sum()
            )
        return loss

    def image_groups(self, batch: Batch) -> Tensor | None:
        """Which tokens see each other both ways: (B, T), k + 1 for those of image k of the batch, 0 for words; or None,
        where `bidirectional_images` is off. What `pixels` counts as an image is one, such as each tile of a picture."""
        if not self.config.bidirectional_images or not len(batch.image_positions):
            return None
        numbers = (
            torch.arange(len(batch.image_positions), device=batch.input_ids.device)
            // self.image_length
            + 1
        )
        groups = batch.input_ids.new_zeros(batch.input_ids.numel()).index_copy_(
            0, batch.image_positions, numbers
        )
        return groups.view_as(batch.input_ids)

    def embed(self, batch: Batch) -> Tensor:
        """Word embeddings with the visual tokens in their places: (B, T, C_t), the decoder's `input_size` wide."""
        words = batch.input_ids.flatten().index_fill(
            0, batch.image_positions, 0
        )  # a row there is, in place of the placeholder
        embeddings = self.language_model.embed_tokens(words.view_as(batch.input_ids))
        if torch.is_autocast_enabled(
            embeddings.device.type
        ):  # the residual stream runs in the precision of the products
            embeddings = embeddings.to(torch.get_autocast_dtype(embeddings.device.type))
        patches = (
            self.look(batch.pixels)
            if batch.patches is None and batch.pixels is not None
            else batch.patches
        )
        found = 0 if patches is None else len(patches)
        if len(batch.image_positions) != found * self.image_length:
            raise NanoVLMError(
                f"the text has {len(batch.image_positions)} image placeholders and {found} pictures of "
                f"{self.image_length} visual tokens fill {found * self.image_length}; they have to be equal"
            )
        if patches is None:
            return embeddings
        visual_tokens = self.projector(patches)  # (N, K, C_t)
        spliced = embeddings.flatten(0, 1).index_copy(
            0, batch.image_positions, visual_tokens.flatten(0, 1).to(embeddings.dtype)
        )
        return spliced.view_as(embeddings)

    def image_tokens(self, width: int, height: int) -> ImageTokens:
        """The placeholders of an image of this size, as `chat.encode` takes them."""
        return ImageTokens(self.image_length, *tile_grid(width, height, self.config.image))

    def look(self, pixels: Tensor) -> Tensor:
        """What the eyes give the projector: (N, 3, H, W) → (N, P, C_v). Where a model answers (inference mode), a few
        pictures at a time: of 32 images to be asked about, tiles make up to 544."""
        pixels = pixels.to(self.vision_encoder.patch_embedding.weight.dtype)
        if not torch.is_inference_mode_enabled() or len(pixels) <= TILES_AT_ONCE:
            return self.vision_encoder.patches(pixels, self.config.vision_layer)
        return torch.cat(
            [
                self.vision_encoder.patches(part, self.config.vision_layer)
                for part in pixels.split(TILES_AT_ONCE)
            ]
        )
