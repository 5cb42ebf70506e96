"""Bytes that frozen parts of a model need at a time; nothing is kept for a backward pass."""

from nanovlm.memory.activations import FP32, Computing, inner_tensors, largest_matrix
from nanovlm.model.language_model import LanguageModel
from nanovlm.model.vlm import VisionLanguageModel


def encoding_memory(model: VisionLanguageModel, images: int, computing: Computing) -> float:
    """Of a frozen vision encoder.

    In one of its blocks: the stream, the normed stream, and either attention or the MLP. In its
    resampler: two vectors per patch, and the keys and values.
    """
    config, image = model.config.vision_encoder, model.config.image
    tokens = config.num_tokens(image.height, image.width)
    stream = images * tokens * config.hidden_size
    written_out = computing.writes_out(tokens, tokens)
    scores = images * config.num_attention_heads * tokens**2 * written_out
    inner = images * tokens * config.intermediate_size * min(3, inner_tensors(config))
    block = (2 * stream + max(4 * stream + 2 * scores, inner)) * computing.size
    return max(block, images * tokens * config.output_size * 2 * (FP32 + computing.size))


def prefill_memory(model: LanguageModel, tokens: int, computing: Computing) -> float:
    """Of a frozen language model that reads `tokens` tokens and predicts the next one: the mask,
    the embeddings, the stream and the normed stream; and either attention or the MLP of one block,
    with one matrix decoded if they are quantised, or the logits."""
    config, size = model.config, computing.size
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    projected = tokens * heads * config.head_dim * size
    written_out = computing.writes_out(tokens, tokens)
    scores = config.num_attention_heads * tokens**2 * size * written_out
    # The experts chosen for a token, and a shared one.
    passes = config.experts_per_token + 1 if config.num_experts else 1
    inner = tokens * passes * (2 * config.intermediate_size + config.hidden_size) * size
    block = max(2 * projected + 2 * scores, inner) + largest_matrix(model, size)
    embeddings = config.input_size * (config.embedding_size > 0)
    stream = tokens * (embeddings + 3 * config.hidden_size) * size
    mask = tokens**2 * (1 + size)
    return stream + mask + max(block, config.vocab_size * (size + FP32))
