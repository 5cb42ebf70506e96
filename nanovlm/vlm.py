"""The whole model in one place: an image's patches become tokens among the words, and the decoder reads on.

pixels (N, 3, H, W) ─ vision ─▶ patches (N, P, C_v) ─ projector ─▶ visual tokens (N, K, C_t)
input_ids (B, T), K placeholders an image ─ embedding ─▶ (B, T, C_t) ◀─ spliced in ─┘ ─ decoder ─▶ loss | next token
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from nanovlm.chat import Chat, ChatConfig, ImageTokens
from nanovlm.config import unknown_key
from nanovlm.decoder import Decoder, DecoderConfig
from nanovlm.errors import NanoVLMError
from nanovlm.files import read_json, write_json
from nanovlm.image import ImageConfig, tile_grid
from nanovlm.loss import chunked_cross_entropy
from nanovlm.projector import ProjectorConfig, build_projector
from nanovlm.tokenizer import Tokenizer, load_tokenizer
from nanovlm.vit import VisionConfig, VisionTransformer
from nanovlm.weights.loading import load_into, open_checkpoint
from nanovlm.weights.safetensors import Deferred, save_file

PICTURES_AT_ONCE = 32  # that the eyes see when a model answers


@dataclass(frozen=True)
class VLMConfig:
    """All parts' settings, and the layer whose patch vectors are looked at (`VisionTransformer.patches`)."""

    vision: VisionConfig
    text: DecoderConfig
    projector: ProjectorConfig
    image: ImageConfig
    chat: ChatConfig
    vision_layer: int = -1
    bidirectional_images: bool = (
        False  # visual tokens of one image see each other both ways; text is causal all the same
    )

    @classmethod
    def from_dict(cls, config: dict) -> "VLMConfig":
        """Read what `dataclasses.asdict` wrote; an unknown or missing key is an error that names it."""
        parts = {
            "vision": VisionConfig,
            "text": DecoderConfig,
            "projector": ProjectorConfig,
            "image": ImageConfig,
            "chat": ChatConfig,
        }
        known = {field.name for field in dataclasses.fields(cls)} | {"model_type"}
        for key in config:
            if key not in known:
                raise unknown_key(key, known, "config.json")
        if config.get("model_type") != "nanovlm":
            raise NanoVLMError(
                f"config.json: model_type is {config.get('model_type')!r}, expected 'nanovlm'; "
                "give the folder of a trained model, such as runs/stage2/model"
            )
        if missing := [name for name in parts if name not in config]:
            raise NanoVLMError(f"config.json: key {missing[0]!r} is missing")
        vision_layer = config.get("vision_layer", -1)
        if type(vision_layer) is not int:
            raise NanoVLMError(
                f"config.json: vision_layer is {vision_layer!r}, expected a whole number such as -1"
            )
        bidirectional = config.get("bidirectional_images", False)
        if type(bidirectional) is not bool:
            raise NanoVLMError(
                f"config.json: bidirectional_images is {bidirectional!r}, expected true or false"
            )
        return cls(
            vision_layer=vision_layer,
            bidirectional_images=bidirectional,
            **{name: part.from_dict(config[name]) for name, part in parts.items()},
        )


@dataclass
class Batch:
    """What one forward pass takes. Positions are flat indices into (B, T), made where the batch is made, so that
    nothing has to be counted on the accelerator."""

    input_ids: Tensor  # (B, T); at `image_positions` the placeholder, which needs no row of the embedding table
    attention_mask: (
        Tensor  # (B, T): 0 padding, 1 a token, more for branches and packed samples (`visibility`)
    )
    image_positions: Tensor  # (N · K,) where the visual tokens go, in the pictures' order
    target_positions: Tensor  # (M,) the positions that predict a labelled token
    targets: Tensor  # (M,) the labelled tokens
    pixels: Tensor | None = None  # (N, 3, H, W): all pictures of all images (`image_pixels`)
    patches: Tensor | None = None  # (N, P, C_v) instead of pixels, where the features are kept

    def to(self, device: torch.device | str) -> "Batch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Into memory from which the copy to a GPU goes on by itself."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        tensors = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return type(self)(
            **{
                name: tensor if tensor is None else function(tensor)
                for name, tensor in tensors.items()
            }
        )


class VisionLanguageModel(nn.Module):
    """Eyes, projector and voice. `tokenizer` and `chat` belong to the voice and travel with it."""

    def __init__(self, config: VLMConfig, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.config, self.tokenizer, self.chat = config, tokenizer, Chat(config.chat, tokenizer)
        # Nobody looks up the placeholder, so it may lie behind the decoder's last row (LLaVA's does).
        placeholder_is_last = self.chat.image_token_id == tokenizer.vocab_size - 1
        if tokenizer.vocab_size - placeholder_is_last > config.text.vocab_size:
            raise NanoVLMError(
                f"the tokenizer knows {tokenizer.vocab_size} tokens and the decoder {config.text.vocab_size}; "
                "they do not belong together"
            )
        self.vision = VisionTransformer(config.vision)
        self.projector = build_projector(
            config.projector,
            config.vision.feature_size(config.vision_layer),
            config.text.input_size,
        )
        self.decoder = Decoder(config.text)
        self.image_length = (
            self.projector.num_tokens(  # K, placeholder tokens that each picture of an image takes
                config.vision.num_features(
                    config.image.height, config.image.width, config.vision_layer
                )
            )
        )
        self.max_image_length = (
            self.image_length * config.image.max_pictures
        )  # of the image that is cut into most tiles
        if self.max_image_length >= config.text.max_position_embeddings:
            raise NanoVLMError(
                f"an image takes up to {self.max_image_length} visual tokens, which leave no room for words among "
                f"the decoder's {config.text.max_position_embeddings} positions; take a projector that makes fewer, "
                "a smaller image or fewer tiles"
            )

    @classmethod
    def from_parts(
        cls,
        vision: str | Path,
        text: str | Path,
        projector: ProjectorConfig,
        image: ImageConfig,
        vision_layer: int = -1,
        *,
        bidirectional_images: bool = False,
        text_config: DecoderConfig | None = None,
        system: str | None = None,
    ) -> "VisionLanguageModel":
        """Join pretrained eyes and a pretrained voice (two hub folders) with a new projector.

        With `text_config` the voice is new, too, and `text` gives its words only. `system` is the prompt of conversations
        that bring none: the voice's own introduces it by its maker's name, and with eyes it is another model.
        """
        eyes, tokenizer = VisionTransformer.from_pretrained(vision), load_tokenizer(text)
        chat = dataclasses.replace(ChatConfig.from_hf(text, tokenizer), default_system=system)
        tokenizer.add_special_token(chat.image_token)
        if text_config is None:
            voice = Decoder.from_pretrained(text)
        else:
            voice = Decoder(
                dataclasses.replace(
                    text_config, vocab_size=max(text_config.vocab_size, tokenizer.vocab_size)
                )
            )
        config = VLMConfig(
            eyes.config, voice.config, projector, image, chat, vision_layer, bidirectional_images
        )
        with torch.device("meta"):
            model = cls(config, tokenizer)
        model.vision, model.decoder = eyes, voice
        model.projector = build_projector(
            projector, eyes.config.feature_size(vision_layer), voice.config.input_size
        )
        return model

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: torch.dtype | None = None
    ) -> "VisionLanguageModel":
        """Load a model folder (`config.json`, `model.safetensors`, tokenizer files); strict, and no weight held twice."""
        folder = Path(folder)
        try:
            config = VLMConfig.from_dict(read_json(folder / "config.json"))
        except NanoVLMError as error:
            raise NanoVLMError(f"{folder}: {error}") from None
        tokenizer = load_tokenizer(folder)
        with torch.device("meta"):
            model = cls(config, tokenizer)
        load_into(model, open_checkpoint(folder), lambda name: name, dtype=dtype)
        return model.eval()

    def save_pretrained(
        self, folder: str | Path, tensors: Mapping[str, Tensor | Deferred] | None = None
    ) -> None:
        """Write a complete model folder, with `tensors` in place of the model's own where they are given. The weights go
        last, so a folder that has them is whole."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"model_type": "nanovlm", **dataclasses.asdict(self.config)}
        write_json(folder / "config.json", config)
        self.tokenizer.save(folder)
        save_file(
            self.state_dict() if tensors is None else tensors,
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )

    def forward(
        self, batch: Batch, of_targets: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    ) -> Tensor:
        """The summed loss over `batch.targets`, a scalar in fp32; or what `of_targets` makes of the same three: hidden
        states (M, C), head (V, C) and targets (M,). Only positions with a label pass the output head.

        In training, the decoder's experts add their load-balance losses to that loss, times the number of targets: divided
        by all of a step's targets, they are a mean weighted by tokens. Of k batches and one k times as large, the rest of
        the loss is exactly the same and this term on average: how busy experts are is counted within a batch.
        """
        balance: list[Tensor] = []
        hidden_states = self.decoder.hidden_states(
            self.embed(batch),
            batch.attention_mask,
            positions=batch.target_positions,
            groups=self.image_groups(batch),
            balance=balance,
        )
        if of_targets is not None:
            return of_targets(hidden_states, self.decoder.head_weight, batch.targets)
        loss = chunked_cross_entropy(hidden_states, self.decoder.head_weight, batch.targets)
        if balance:
            loss = (
                loss
                + self.config.text.balance_loss * len(batch.targets) * torch.stack(balance).sum()
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
        embeddings = self.decoder.embed_tokens(words.view_as(batch.input_ids))
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
        pixels = pixels.to(self.vision.patch_embedding.weight.dtype)
        if not torch.is_inference_mode_enabled() or len(pixels) <= PICTURES_AT_ONCE:
            return self.vision.patches(pixels, self.config.vision_layer)
        return torch.cat(
            [
                self.vision.patches(part, self.config.vision_layer)
                for part in pixels.split(PICTURES_AT_ONCE)
            ]
        )
