"""The decoder against `transformers`' Qwen2, Qwen3, LLaMA and Mistral, every variant, with padding, with a cache, and in
branches; and against what the published code of Qwen's first generation answered."""

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from nanovlm.decoder import Decoder, DecoderConfig
from nanovlm.errors import NanoVLMError
from nanovlm.generate import Sampling, decode
from tests.reference.models import qwen, qwen1

LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32}  # so that fast, blended and slow pairs are among the few there are
VARIANTS = {
    "qwen2": {},
    "qwen2 tied": {"tie_word_embeddings": True},
    "qwen2 with its own head width": {"head_dim": 12},
    "one key head": {"num_key_value_heads": 1},
    "a key head each": {"num_key_value_heads": 4},
    "qwen3": {"family": "qwen3", "head_dim": 16},
    "qwen3 tied": {"family": "qwen3", "head_dim": 8, "tie_word_embeddings": True, "num_key_value_heads": 1},
    "llama": {"family": "llama"},
    "llama tied": {"family": "llama", "tie_word_embeddings": True, "num_key_value_heads": 4},
    "llama with biases": {"family": "llama", "attention_bias": True, "mlp_bias": True, "head_dim": 12},
    "llama 3.1": {"family": "llama", "rope_parameters": LLAMA3_ROPE, "head_dim": 16},
    "mistral": {"family": "mistral", "sliding_window": None},
    "sharded": {"max_shard_size": "20KB"},
}
TOLERANCE = dict(atol=2e-5, rtol=0)  # of logits whose standard deviation is about 1


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS.keys())
def pair(request: pytest.FixtureRequest, tmp_path_factory) -> tuple[Decoder, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("qwen")
    reference = qwen(folder, **request.param)
    return Decoder.from_pretrained(folder), reference


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Decoder:
    folder = tmp_path_factory.mktemp("qwen3")
    qwen(folder, "qwen3", head_dim=16)
    return Decoder.from_pretrained(folder)


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(97, shape, generator=torch.Generator().manual_seed(seed))


def padding(lengths: list[int], width: int, left: bool) -> torch.Tensor:
    """A (B, T) mask of ones where the tokens are."""
    index = torch.arange(width)
    return torch.stack([index >= width - length if left else index < length for length in lengths]).long()


@torch.inference_mode()
def test_equals_the_reference(pair):
    ours, reference = pair
    ids = random_ids(3, 17)
    expected = reference(ids).logits
    assert 0.5 < expected.std() < 3  # what the tolerance is relative to
    torch.testing.assert_close(ours(ids), expected, **TOLERANCE)
    torch.testing.assert_close(ours(ids, torch.ones_like(ids)), expected, **TOLERANCE)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@torch.inference_mode()
def test_equals_the_reference_with_padding(pair, left):
    ours, reference = pair
    ids, mask = random_ids(4, 15), padding([15, 9, 1, 12], 15, left)
    position_ids = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    expected = reference(ids, attention_mask=mask, position_ids=position_ids).logits
    torch.testing.assert_close(ours(ids, mask)[mask > 0], expected[mask > 0], **TOLERANCE)


@pytest.mark.parametrize("left", [False, True], ids=["no padding", "left padding"])
@torch.inference_mode()
def test_a_cache_fed_in_uneven_pieces_equals_one_pass(pair, left):
    ours, reference = pair
    ids = random_ids(3, 16)
    mask = padding([16, 7, 10], 16, left=True) if left else None
    position_ids = None if mask is None else (mask.cumsum(dim=-1) - 1).clamp(min=0)
    expected = reference(ids, attention_mask=mask, position_ids=position_ids).logits
    cache, pieces, start = ours.new_cache(3, 16), [], 0
    for count in (5, 1, 1, 6, 2, 1):
        end = start + count
        pieces.append(ours(ids[:, start:end], None if mask is None else mask[:, :end], cache))
        start = end
    assert cache.length == 16
    present = slice(None) if mask is None else mask > 0
    torch.testing.assert_close(torch.cat(pieces, dim=1)[present], expected[present], **TOLERANCE)


@torch.inference_mode()
def test_bfloat16_is_as_close_to_fp32_as_the_reference_is(pair, tmp_path):
    _, reference = pair
    ids, mask = random_ids(4, 17), padding([17, 9, 3, 12], 17, left=True)
    position_ids = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    exact = reference(ids, mask, position_ids).logits[mask > 0]
    reference.save_pretrained(tmp_path)
    ours = Decoder.from_pretrained(tmp_path, dtype=torch.bfloat16)
    logits = ours(ids, mask)[mask > 0]
    assert logits.dtype == torch.bfloat16
    half = type(reference).from_pretrained(tmp_path, dtype=torch.bfloat16)
    error, their_error = (logits - exact).abs(), (half(ids, mask, position_ids).logits[mask > 0] - exact).abs()
    assert error.mean() < 0.015 and error.max() < 0.15  # of logits whose standard deviation is about 1
    assert error.mean() < 1.2 * their_error.mean()


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@torch.inference_mode()
def test_older_and_newer_files_spell_rope_theta_differently(tmp_path, family):
    reference = qwen(tmp_path, family)
    newer = Decoder.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["rope_scaling"] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    older = Decoder.from_pretrained(tmp_path)
    assert older.config == newer.config and older.config.rope_theta == 1e5
    ids = random_ids(1, 200)  # far enough for another theta to show
    torch.testing.assert_close(older(ids), reference(ids).logits, **TOLERANCE)


def test_the_head_is_the_embedding_table_when_tied(tmp_path):
    qwen(tmp_path, tie_word_embeddings=True)
    ours = Decoder.from_pretrained(tmp_path)
    assert ours.head_weight is ours.embed_tokens.weight
    assert "lm_head.weight" not in ours.state_dict()


@torch.inference_mode()
def test_a_later_token_leaves_earlier_logits_alone(decoder):
    ids = random_ids(1, 12)
    changed = ids.clone()
    changed[0, 8] = (ids[0, 8] + 1) % 97
    for mask in (None, torch.ones_like(ids)):
        before, after = decoder(ids, mask), decoder(changed, mask)
        assert torch.equal(before[:, :8], after[:, :8])
        assert (before[:, 8:] - after[:, 8:]).abs().amax(dim=-1).min() > 1e-2


@torch.inference_mode()
def test_a_branch_equals_a_row_of_its_own(decoder):
    prefix, branches = random_ids(6, seed=1), [random_ids(length, seed=length) for length in (4, 1, 7)]
    ids = torch.cat([prefix, *branches])
    mask = torch.tensor([1] * 6 + [2] * 4 + [3] + [4] * 7)
    logits = decoder(ids[None], mask[None])[0]
    padded = torch.cat((torch.zeros(3, dtype=torch.long), ids)), torch.cat((torch.zeros(3, dtype=torch.long), mask))
    torch.testing.assert_close(decoder(padded[0][None], padded[1][None])[0, 3:], logits, **TOLERANCE)
    for number, branch in enumerate(branches, start=2):
        alone = decoder(torch.cat((prefix, branch))[None])[0]
        torch.testing.assert_close(logits[mask == number], alone[6:], **TOLERANCE)
    torch.testing.assert_close(logits[:6], decoder(prefix[None])[0], **TOLERANCE)


def test_gradients_equal_the_reference(pair):
    ours, reference = pair
    ids, mask = random_ids(2, 11), padding([11, 6], 11, left=False)
    weights = torch.randn(2, 11, 97, generator=torch.Generator().manual_seed(1)) * mask[..., None]
    embeddings = []
    for model, table in ((ours, ours.embed_tokens), (reference, reference.get_input_embeddings())):
        model.zero_grad()
        logits = model(ids, mask) if model is ours else model(ids, attention_mask=mask).logits
        (logits * weights).sum().backward()
        embeddings.append(table.weight.grad)
    # Through every layer down to the embeddings, whose gradients are sums of about 100 terms.
    torch.testing.assert_close(*embeddings, atol=2e-4, rtol=1e-4)


def test_config_of_a_folder_equals_what_was_asked_for(tmp_path: Path):
    qwen(tmp_path, "qwen3", head_dim=16, rms_norm_eps=1e-5)
    assert Decoder.from_pretrained(tmp_path).config == DecoderConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, qkv_bias=False, qk_norm=True, rms_norm_eps=1e-5, rope_theta=1e5,
        max_position_embeddings=256, tie_word_embeddings=False)


@torch.inference_mode()
def test_far_positions_equal_the_reference(pair):
    """Where rotary scaling shows."""
    ours, reference = pair
    ids = random_ids(1, 200)
    torch.testing.assert_close(ours(ids), reference(ids).logits, **TOLERANCE)


def test_llama3_scaling_is_read_in_both_spellings(tmp_path):
    qwen(tmp_path, "llama", rope_parameters=LLAMA3_ROPE)
    config = json.loads((tmp_path / "config.json").read_text())
    newer = DecoderConfig.from_hf(config)
    scaling = config.pop("rope_parameters")
    older = config | {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    assert DecoderConfig.from_hf(older) == newer
    assert (newer.rope_type, newer.rope_factor, newer.original_max_position_embeddings) == ("llama3", 8.0, 32)


@pytest.fixture(scope="module")
def first_qwen(tmp_path_factory) -> tuple[Decoder, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("qwen1")
    recorded = qwen1(folder)
    return Decoder.from_pretrained(folder), recorded


@torch.inference_mode()
def test_the_first_qwen_equals_its_published_code(first_qwen):
    ours, recorded = first_qwen
    torch.testing.assert_close(ours(recorded["ids"]), recorded["logits"], **TOLERANCE)
    torch.testing.assert_close(ours(recorded["ids_long"]), recorded["logits_long"], **TOLERANCE)
    assert recorded["ids_long"].shape[1] > ours.config.original_max_position_embeddings


@torch.inference_mode()
def test_the_first_qwen_stretches_by_each_rows_own_length(first_qwen):
    """A short row keeps its base beside a long one, and padding does not count."""
    ours, recorded = first_qwen
    ids = torch.cat((recorded["ids_long"], torch.nn.functional.pad(recorded["ids"][:1], (24, 0))))
    logits = ours(ids, padding([48, 24], 48, left=True))
    torch.testing.assert_close(logits[0], recorded["logits_long"][0], **TOLERANCE)
    torch.testing.assert_close(logits[1, 24:], recorded["logits"][0], **TOLERANCE)


@torch.inference_mode()
def test_the_first_qwen_is_trained_without_stretching(tmp_path):
    recorded = qwen1(tmp_path)
    ours = Decoder.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"use_dynamic_ntk": False, "use_logn_attn": False}))
    plain = Decoder.from_pretrained(tmp_path)
    ids = recorded["ids_long"]
    assert torch.equal(ours.train()(ids), plain(ids))
    assert (ours.eval()(ids) - plain(ids)).abs().max() > 0.1


@torch.inference_mode()
def test_the_first_qwen_in_bfloat16(tmp_path):
    recorded = qwen1(tmp_path)
    half = Decoder.from_pretrained(tmp_path, dtype=torch.bfloat16)
    error = (half(recorded["ids_long"]) - recorded["logits_long"]).abs()
    assert error.mean() < 0.015 and error.max() < 0.15  # of logits whose standard deviation is about 0.8


@pytest.mark.parametrize("length", [9, 30, 40], ids=["short", "crosses the trained length while it writes", "long"])
def test_the_first_qwen_writes_the_same_with_and_without_a_cache(first_qwen, length):
    ours, recorded = first_qwen
    short = torch.nn.functional.pad(recorded["ids"][:1, :5], (length - 5, 0))
    ids, mask = torch.cat((recorded["ids_long"][:, :length], short)), padding([length, 5], length, left=True)
    with torch.inference_mode():
        cached, uncached = (list(decode(ours, ours.embed_tokens(ids), ids, mask, 20, (), Sampling(1.0), use_cache))
                            for use_cache in (True, False))
    assert cached == uncached and len(set(next(zip(*cached)))) > 10


HUB_QWEN_7B_CHAT = {
    "architectures": ["QWenLMHeadModel"], "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"}, "attn_dropout_prob": 0.0,
    "bf16": False, "emb_dropout_prob": 0.0, "fp16": False, "fp32": False, "hidden_size": 4096, "intermediate_size": 22016,
    "initializer_range": 0.02, "kv_channels": 128, "layer_norm_epsilon": 1e-06, "max_position_embeddings": 32768,
    "model_type": "qwen", "no_bias": True, "num_attention_heads": 32, "num_hidden_layers": 32, "onnx_safe": None,
    "rotary_emb_base": 10000, "rotary_pct": 1.0, "scale_attn_weights": True, "seq_length": 8192, "softmax_in_fp32": False,
    "tie_word_embeddings": False, "tokenizer_class": "QWenTokenizer", "transformers_version": "4.32.0", "use_cache": True,
    "use_cache_kernel": False, "use_cache_quantization": False, "use_dynamic_ntk": True, "use_flash_attn": "auto",
    "use_logn_attn": True, "vocab_size": 151936}


def test_the_published_qwen_7b_chat():
    config = DecoderConfig.from_hf(HUB_QWEN_7B_CHAT)
    assert config == DecoderConfig(
        151936, 4096, 11008, 32, 32, 32, 128, qkv_bias=True, rms_norm_eps=1e-6, rope_theta=10000, max_position_embeddings=32768,
        tie_word_embeddings=False, rope_type="dynamic_ntk", original_max_position_embeddings=8192, logn_attention=True)
    with torch.device("meta"):
        decoder = Decoder(config)
    assert sum(parameter.numel() for parameter in decoder.parameters()) == 7_721_324_544  # as its card says, 7.7 billion


@pytest.mark.parametrize("change, message", [
    ({"no_bias": False}, "no_bias = False is not implemented, only True"),
    ({"rotary_pct": 0.25}, "rotary_pct = 0.25 is not implemented"),
    ({"scale_attn_weights": False}, "scale_attn_weights = False is not implemented"),
    ({"seq_length": None}, "key 'seq_length' is missing"),
    ({"intermediate_size": 22017}, "intermediate_size = 22017 has to be even"),
    ({"seq_lenght": 8192}, "unknown key 'seq_lenght'; did you mean 'seq_length'"),
])
def test_a_first_qwen_that_is_not_implemented_is_refused(change, message):
    with pytest.raises(NanoVLMError, match=message):
        DecoderConfig.from_hf(HUB_QWEN_7B_CHAT | change)
