"""nanovlm: a small Chinese/English vision-language model in plain PyTorch. Start reading at `vlm.py`."""

from nanovlm.chat import IMAGE, Chat, ChatConfig, ImageTokens, Message
from nanovlm.decoder import Decoder, DecoderConfig
from nanovlm.errors import NanoVLMError
from nanovlm.generate import Sampling, generate
from nanovlm.image import ImageConfig, image_pixels, open_image, preprocess
from nanovlm.projector import ProjectorConfig
from nanovlm.tokenizer import load_tokenizer
from nanovlm.vit import VisionConfig, VisionTransformer
from nanovlm.vlm import Batch, VisionLanguageModel, VLMConfig

__all__ = [
    "IMAGE",
    "Batch",
    "Chat",
    "ChatConfig",
    "Decoder",
    "DecoderConfig",
    "ImageConfig",
    "ImageTokens",
    "Message",
    "NanoVLMError",
    "ProjectorConfig",
    "Sampling",
    "VLMConfig",
    "VisionConfig",
    "VisionLanguageModel",
    "VisionTransformer",
    "generate",
    "image_pixels",
    "load_tokenizer",
    "open_image",
    "preprocess",
]
