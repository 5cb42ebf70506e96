"""nanovlm: a small Chinese/English vision-language model in plain PyTorch.

Start reading at `model/vlm.py`.
"""

# First, because the others take seconds, in which Ctrl-C should not show a traceback.
from nanovlm.utils import interruption  # noqa: F401

# isort: split
from nanovlm.data.collate import prepare
from nanovlm.errors import NanoVLMError
from nanovlm.generate import generate
from nanovlm.hub.models import load_language_model, load_model, load_vision_encoder, save_model
from nanovlm.inputs.batch import Batch
from nanovlm.inputs.chat import IMAGE, Chat, ChatConfig, ImageTokens, Message
from nanovlm.inputs.image import image_pixels, open_image, preprocess
from nanovlm.inputs.image_config import ImageConfig
from nanovlm.model.language_model import LanguageModel, LanguageModelConfig
from nanovlm.model.projector import ProjectorConfig
from nanovlm.model.vision_encoder import VisionEncoder, VisionEncoderConfig
from nanovlm.model.vlm import VisionLanguageModel, VLMConfig
from nanovlm.sampling import Sampling
from nanovlm.tokenizer import load_tokenizer

__all__ = [
    "IMAGE",
    "Batch",
    "Chat",
    "ChatConfig",
    "ImageConfig",
    "ImageTokens",
    "LanguageModel",
    "LanguageModelConfig",
    "Message",
    "NanoVLMError",
    "ProjectorConfig",
    "Sampling",
    "VLMConfig",
    "VisionEncoder",
    "VisionEncoderConfig",
    "VisionLanguageModel",
    "generate",
    "image_pixels",
    "load_language_model",
    "load_model",
    "load_tokenizer",
    "load_vision_encoder",
    "open_image",
    "prepare",
    "preprocess",
    "save_model",
]
