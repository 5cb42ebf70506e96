"""Weights on disk: the safetensors format written out by hand, and strict loading into a module."""

from nanovlm.weights.loading import Checkpoint, load_into, open_checkpoint
from nanovlm.weights.safetensors import SafetensorsFile, save_file

__all__ = ["Checkpoint", "SafetensorsFile", "load_into", "open_checkpoint", "save_file"]
