"""The language model against `transformers`' Qwen2, Qwen3, LLaMA, Mistral and GPT-2, with padding,
with a cache and with branches; and against outputs of the published code of the first Qwen."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from nanovlm.errors import NanoVLMError
from nanovlm.generate import Prompt, decode
from nanovlm.hub.language_configs import parse_language_model_config
from nanovlm.hub.models import load_language_model, save_language_model
from nanovlm.hub.safetensors import SafetensorsFile, save_file
from nanovlm.model.attention import SEGMENT
from nanovlm.model.language_model import LanguageModel, LanguageModelConfig
from nanovlm.model.moe import take_balance_loss
from nanovlm.sampling import Sampling
from tests.reference.models import qwen, qwen1, randomise

# Chosen so that the few frequencies of a small head are kept, blended and scaled ones.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS = {
    "qwen2": {},
    "qwen2 tied": {"tie_word_embeddings": True},
    "qwen2 with head_dim": {"head_dim": 12},
    "one key head": {"num_key_value_heads": 1},
    "as many key heads as query heads": {"num_key_value_heads": 4},
    "qwen3": {"family": "qwen3", "head_dim": 16},
    "qwen3 tied": {
        "family": "qwen3",
        "head_dim": 8,
        "tie_word_embeddings": True,
        "num_key_value_heads": 1,
    },
    "llama": {"family": "llama"},
    "llama tied": {"family": "llama", "tie_word_embeddings": True, "num_key_value_heads": 4},
    "llama with biases": {
        "family": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "head_dim": 12,
    },
    "llama 3.1": {"family": "llama", "rope_parameters": LLAMA3_ROPE, "head_dim": 16},
    "mistral": {"family": "mistral", "sliding_window": None},
    "sharded": {"max_shard_size": "20KB"},
}
TOLERANCE = dict(atol=2e-5, rtol=0)  # for logits with a standard deviation of about 1


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS.keys())
def pair(request: pytest.FixtureRequest, tmp_path_factory) -> tuple[LanguageModel, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("qwen")
    reference = qwen(folder, **request.param)
    return load_language_model(folder), reference


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LanguageModel:
    folder = tmp_path_factory.mktemp("qwen3")
    qwen(folder, "qwen3", head_dim=16)
    return load_language_model(folder)


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(97, shape, generator=torch.Generator().manual_seed(seed))


def padding(lengths: list[int], width: int, left: bool) -> Tensor:
    """A (B, T) mask: 1 for a token, 0 for padding."""
    index = torch.arange(width)
    rows = [index >= width - length if left else index < length for length in lengths]
    return torch.stack(rows).long()


@torch.inference_mode()
def test_equals_the_reference(pair):
    ours, reference = pair
    ids = random_ids(3, 17)
    expected = reference(ids).logits
    assert 0.5 < expected.std() < 3  # the scale that the tolerance assumes
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
    ours = load_language_model(tmp_path, dtype=torch.bfloat16)
    logits = ours(ids, mask)[mask > 0]
    assert logits.dtype == torch.bfloat16
    half = type(reference).from_pretrained(tmp_path, dtype=torch.bfloat16)
    error = (logits - exact).abs()
    reference_error = (half(ids, mask, position_ids).logits[mask > 0] - exact).abs()
    # The standard deviation of the logits is about 1.
    assert error.mean() < 0.015 and error.max() < 0.15
    assert error.mean() < 1.2 * reference_error.mean()


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@torch.inference_mode()
def test_rope_theta_is_read_from_older_and_newer_configs(tmp_path, family):
    reference = qwen(tmp_path, family)
    newer = load_language_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["rope_scaling"] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    older = load_language_model(tmp_path)
    assert older.config == newer.config and older.config.rope_theta == 1e5
    ids = random_ids(1, 200)  # long enough that another theta would change the logits
    torch.testing.assert_close(older(ids), reference(ids).logits, **TOLERANCE)


def test_the_head_is_the_embedding_table_when_tied(tmp_path):
    qwen(tmp_path, tie_word_embeddings=True)
    ours = load_language_model(tmp_path)
    assert ours.head_weight is ours.embed_tokens.weight
    assert "lm_head.weight" not in ours.state_dict()


def test_a_tied_head_stored_beside_the_embedding_table_has_to_equal_it(tmp_path):
    """Qwen3-0.6B's file holds both."""
    qwen(tmp_path, "qwen3", tie_word_embeddings=True)
    alone = load_language_model(tmp_path).state_dict()
    file = SafetensorsFile(tmp_path / "model.safetensors")
    tensors = {name: file.tensor(name).clone() for name in file.keys()}
    table = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": table}, tmp_path / "model.safetensors")
    both = load_language_model(tmp_path)
    is_tied = both.head_weight is both.embed_tokens.weight
    assert is_tied and both.state_dict().keys() == alone.keys()
    assert all(torch.equal(tensor, alone[name]) for name, tensor in both.state_dict().items())
    save_file(tensors | {"lm_head.weight": table + 1}, tmp_path / "model.safetensors")
    with pytest.raises(NanoVLMError, match="tied but stored with different values"):
        load_language_model(tmp_path)


@torch.inference_mode()
def test_a_later_token_does_not_change_earlier_logits(model):
    ids = random_ids(1, 12)
    changed = ids.clone()
    changed[0, 8] = (ids[0, 8] + 1) % 97
    for mask in (None, torch.ones_like(ids)):
        before, after = model(ids, mask), model(changed, mask)
        assert torch.equal(before[:, :8], after[:, :8])
        assert (before[:, 8:] - after[:, 8:]).abs().amax(dim=-1).min() > 1e-2


@torch.inference_mode()
def test_a_branch_equals_its_text_in_a_row_of_its_own(model):
    prefix = random_ids(6, seed=1)
    branches = [random_ids(length, seed=length) for length in (4, 1, 7)]
    ids = torch.cat([prefix, *branches])
    mask = torch.tensor([1] * 6 + [2] * 4 + [3] + [4] * 7)
    logits = model(ids[None], mask[None])[0]
    padded = model(F.pad(ids, (3, 0))[None], F.pad(mask, (3, 0))[None])[0]
    torch.testing.assert_close(padded[3:], logits, **TOLERANCE)
    for number, branch in enumerate(branches, start=2):
        alone = model(torch.cat((prefix, branch))[None])[0]
        torch.testing.assert_close(logits[mask == number], alone[6:], **TOLERANCE)
    torch.testing.assert_close(logits[:6], model(prefix[None])[0], **TOLERANCE)


def test_gradients_equal_the_reference(pair):
    ours, reference = pair
    ids, mask = random_ids(2, 11), padding([11, 6], 11, left=False)
    weights = torch.randn(2, 11, 97, generator=torch.Generator().manual_seed(1)) * mask[..., None]
    embeddings = []
    tables = (ours.embed_tokens, reference.get_input_embeddings())
    for model, table in zip((ours, reference), tables):
        model.zero_grad()
        logits = model(ids, mask) if model is ours else model(ids, attention_mask=mask).logits
        (logits * weights).sum().backward()
        embeddings.append(table.weight.grad)
    # These have passed every layer, and each is a sum of about 100 terms.
    torch.testing.assert_close(*embeddings, atol=2e-4, rtol=1e-4)


def test_the_config_of_a_published_folder_is_read(tmp_path: Path):
    qwen(tmp_path, "qwen3", head_dim=16, rms_norm_eps=1e-5)
    assert load_language_model(tmp_path).config == LanguageModelConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        qkv_bias=False,
        qk_norm=True,
        rms_norm_eps=1e-5,
        rope_theta=1e5,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )


@torch.inference_mode()
def test_far_positions_equal_the_reference(pair):
    """At positions that rotary scaling changes."""
    ours, reference = pair
    ids = random_ids(1, 200)
    torch.testing.assert_close(ours(ids), reference(ids).logits, **TOLERANCE)


def test_llama3_scaling_is_read_from_older_and_newer_configs(tmp_path):
    qwen(tmp_path, "llama", rope_parameters=LLAMA3_ROPE)
    config = json.loads((tmp_path / "config.json").read_text())
    newer = parse_language_model_config(config)
    scaling = config.pop("rope_parameters")
    older = config | {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    assert parse_language_model_config(older) == newer
    rope = (newer.rope_type, newer.rope_factor, newer.original_max_position_embeddings)
    assert rope == ("llama3", 8.0, 32)


@pytest.fixture(scope="module")
def first_qwen(tmp_path_factory) -> tuple[LanguageModel, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("qwen1")
    recorded = qwen1(folder)
    return load_language_model(folder), recorded


@torch.inference_mode()
def test_the_first_qwen_equals_its_published_code(first_qwen):
    ours, recorded = first_qwen
    torch.testing.assert_close(ours(recorded["ids"]), recorded["logits"], **TOLERANCE)
    torch.testing.assert_close(ours(recorded["ids_long"]), recorded["logits_long"], **TOLERANCE)
    assert recorded["ids_long"].shape[1] > ours.config.original_max_position_embeddings


@torch.inference_mode()
def test_the_first_qwen_scales_rotary_frequencies_by_the_length_of_each_row(first_qwen):
    """A short row keeps its rotary base beside a long one, and padding does not count as length."""
    ours, recorded = first_qwen
    ids = torch.cat((recorded["ids_long"], F.pad(recorded["ids"][:1], (24, 0))))
    logits = ours(ids, padding([48, 24], 48, left=True))
    torch.testing.assert_close(logits[0], recorded["logits_long"][0], **TOLERANCE)
    torch.testing.assert_close(logits[1, 24:], recorded["logits"][0], **TOLERANCE)


@torch.inference_mode()
def test_the_first_qwen_is_trained_without_dynamic_ntk_and_logn_attention(tmp_path):
    recorded = qwen1(tmp_path)
    ours = load_language_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"use_dynamic_ntk": False, "use_logn_attn": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    plain = load_language_model(tmp_path)
    ids = recorded["ids_long"]
    assert torch.equal(ours.train()(ids), plain(ids))
    assert (ours.eval()(ids) - plain(ids)).abs().max() > 0.1


@torch.inference_mode()
def test_the_first_qwen_in_bfloat16(tmp_path):
    recorded = qwen1(tmp_path)
    half = load_language_model(tmp_path, dtype=torch.bfloat16)
    error = (half(recorded["ids_long"]) - recorded["logits_long"]).abs()
    # The standard deviation of the logits is about 0.8.
    assert error.mean() < 0.015 and error.max() < 0.15


@pytest.mark.parametrize(
    "length", [9, 30, 40], ids=["short", "exceeds the trained length while decoding", "long"]
)
def test_the_first_qwen_generates_the_same_with_and_without_a_cache(first_qwen, length):
    ours, recorded = first_qwen
    short = F.pad(recorded["ids"][:1, :5], (length - 5, 0))
    ids = torch.cat((recorded["ids_long"][:, :length], short))
    mask = padding([length, 5], length, left=True)
    with torch.inference_mode():
        prompt = Prompt(ours.embed_tokens(ids), ids, mask)
        cached, uncached = (
            list(decode(ours, prompt, 20, (), Sampling(1.0), use_cache))
            for use_cache in (True, False)
        )
    assert cached == uncached and len(set(next(zip(*cached)))) > 10


HUB_QWEN_7B_CHAT = {
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"},
    "attn_dropout_prob": 0.0,
    "bf16": False,
    "emb_dropout_prob": 0.0,
    "fp16": False,
    "fp32": False,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "initializer_range": 0.02,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-06,
    "max_position_embeddings": 32768,
    "model_type": "qwen",
    "no_bias": True,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "onnx_safe": None,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 8192,
    "softmax_in_fp32": False,
    "tie_word_embeddings": False,
    "tokenizer_class": "QWenTokenizer",
    "transformers_version": "4.32.0",
    "use_cache": True,
    "use_cache_kernel": False,
    "use_cache_quantization": False,
    "use_dynamic_ntk": True,
    "use_flash_attn": "auto",
    "use_logn_attn": True,
    "vocab_size": 151936,
}


def test_the_published_qwen_7b_chat():
    config = parse_language_model_config(HUB_QWEN_7B_CHAT)
    assert config == LanguageModelConfig(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        qkv_bias=True,
        rms_norm_eps=1e-6,
        rope_theta=10000,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        rope_type="dynamic_ntk",
        original_max_position_embeddings=8192,
        logn_attention=True,
    )
    with torch.device("meta"):
        model = LanguageModel(config)
    # The model card says 7.7 billion.
    assert sum(parameter.numel() for parameter in model.parameters()) == 7_721_324_544


def test_the_published_qwen_72b_chat():
    larger = {
        "hidden_size": 8192,
        "intermediate_size": 49152,
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
        "rope_theta": 1000000,
        "rotary_emb_base": 1000000,
        "use_dynamic_ntk": False,
        "use_logn_attn": False,
        "vocab_size": 152064,
    }
    assert parse_language_model_config(HUB_QWEN_7B_CHAT | larger) == LanguageModelConfig(
        vocab_size=152064,
        hidden_size=8192,
        intermediate_size=24576,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=64,
        head_dim=128,
        qkv_bias=True,
        rms_norm_eps=1e-6,
        rope_theta=1000000,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"no_bias": False}, "no_bias = False is not implemented, only True"),
        ({"rotary_pct": 0.25}, "rotary_pct = 0.25 is not implemented"),
        ({"scale_attn_weights": False}, "scale_attn_weights = False is not implemented"),
        ({"seq_length": None}, "key 'seq_length' is missing"),
        ({"intermediate_size": 22017}, "intermediate_size = 22017 has to be even"),
        ({"seq_lenght": 8192}, "unknown key 'seq_lenght'; did you mean 'seq_length'"),
    ],
)
def test_an_unsupported_config_of_the_first_qwen_is_refused(change, message):
    with pytest.raises(NanoVLMError, match=message):
        parse_language_model_config(HUB_QWEN_7B_CHAT | change)


# ---- a language model trained from scratch

GPT = LanguageModelConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=8,
    norm="layer",
    rms_norm_eps=1e-5,
    positions="learned",
    mlp="gelu",
    output_bias=True,
    mlp_bias=True,
    max_position_embeddings=24,
)
SCRATCH = dataclasses.replace(
    GPT,
    tie_word_embeddings=False,
    embedding_size=40,
    reducer_size=12,
    num_experts=4,
    num_shared_experts=1,
    balance_loss=0.01,
)


@pytest.fixture(
    params=[
        SCRATCH,
        GPT,
        dataclasses.replace(SCRATCH, mlp="gated", norm="rms", positions="rotary"),
    ],
    ids=["experts, learned positions", "dense", "gated experts, rotary"],
)
def scratch(request: pytest.FixtureRequest) -> LanguageModel:
    return from_scratch(request.param)


def from_scratch(config: LanguageModelConfig) -> LanguageModel:
    model = LanguageModel(config)
    randomise(model, seed=0)
    return model.eval()


def gpt2() -> tuple[LanguageModel, PreTrainedModel]:
    """Our model and the reference with the same random weights; the reference's are (in, out)."""
    reference = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=97,
            n_positions=24,
            n_embd=32,
            n_layer=3,
            n_head=4,
            n_inner=48,
            activation_function="gelu",
        )
    ).eval()
    randomise(reference, seed=0)
    transformer, state = reference.transformer, {}
    for number, block in enumerate(transformer.h):
        names = {
            "attention.out_proj": block.attn.c_proj,
            "mlp.up_proj": block.mlp.c_fc,
            "mlp.down_proj": block.mlp.c_proj,
        }
        pieces = {
            f"attention.{name}_proj.weight": piece
            for name, piece in zip("qkv", block.attn.c_attn.weight.T.chunk(3))
        }
        pieces |= {
            f"attention.{name}_proj.bias": piece
            for name, piece in zip("qkv", block.attn.c_attn.bias.chunk(3))
        }
        pieces |= {f"{name}.weight": layer.weight.T for name, layer in names.items()}
        pieces |= {f"{name}.bias": layer.bias for name, layer in names.items()}
        for name, norm in (("attention_norm", block.ln_1), ("mlp_norm", block.ln_2)):
            pieces |= {f"{name}.weight": norm.weight, f"{name}.bias": norm.bias}
        state |= {f"blocks.{number}.{name}": piece for name, piece in pieces.items()}
    state |= {
        "embed_tokens.weight": transformer.wte.weight,
        "position_embedding.weight": transformer.wpe.weight,
        "norm.weight": transformer.ln_f.weight,
        "norm.bias": transformer.ln_f.bias,
    }
    model = LanguageModel(GPT).eval()
    model.load_state_dict(state)
    return model, reference


@torch.inference_mode()
def test_layer_norm_learned_positions_and_gelu_mlp_equal_gpt2():
    ours, reference = gpt2()
    ids = random_ids(3, 17)
    expected = reference(ids).logits
    assert 0.5 < expected.std() < 5
    torch.testing.assert_close(ours(ids), expected, **TOLERANCE)
    mask = padding([17, 6, 11], 17, left=True)
    position_ids = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    expected = reference(ids, attention_mask=mask, position_ids=position_ids).logits
    torch.testing.assert_close(ours(ids, mask)[mask > 0], expected[mask > 0], **TOLERANCE)


@torch.inference_mode()
def test_the_reducer_equals_its_formula():
    """Two linear layers with a GELU between them and a layer norm, before the positions are
    added."""
    model, embeddings = from_scratch(SCRATCH), torch.randn(2, 5, 40)
    block_inputs = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: block_inputs.append(inputs[0]))
    model.hidden_states(embeddings)
    reducer = model.reducer
    hidden = F.gelu(embeddings @ reducer.down.weight.T + reducer.down.bias)
    hidden = hidden @ reducer.up.weight.T + reducer.up.bias
    variance, mean = torch.var_mean(hidden, dim=-1, correction=0, keepdim=True)
    hidden = (hidden - mean) / (variance + 1e-5).sqrt() * reducer.norm.weight + reducer.norm.bias
    torch.testing.assert_close(block_inputs[0], hidden + model.position_embedding.weight[:5])
    assert model.embed_tokens.weight.shape == (97, 40) and model.head_weight.shape == (97, 32)
    assert model.config.input_size == 40 and GPT.input_size == 32


@pytest.mark.parametrize("left", [False, True], ids=["no padding", "left padding"])
@torch.inference_mode()
def test_from_scratch_a_cache_equals_one_pass(scratch, left):
    ids = random_ids(3, 16)
    mask = padding([16, 7, 10], 16, left=True) if left else None
    expected, cache, pieces, start = scratch(ids, mask), scratch.new_cache(3, 16), [], 0
    for count in (5, 1, 6, 1, 3):
        end = start + count
        pieces.append(scratch(ids[:, start:end], None if mask is None else mask[:, :end], cache))
        start = end
    present = slice(None) if mask is None else mask > 0
    torch.testing.assert_close(torch.cat(pieces, dim=1)[present], expected[present], **TOLERANCE)


@torch.inference_mode()
def test_from_scratch_padding_packing_and_later_tokens_do_not_change_the_logits(scratch):
    one, two = random_ids(9, seed=1), random_ids(7, seed=2)
    expected = scratch(one[None])[0]
    for left in (False, True):
        row, mask = torch.zeros(1, 14, dtype=torch.long), padding([9], 14, left)
        row[mask > 0] = one
        torch.testing.assert_close(scratch(row, mask)[mask > 0], expected, **TOLERANCE)
    packed = scratch(torch.cat((two, one))[None], torch.tensor([[1] * 7 + [SEGMENT + 1] * 9]))[0]
    torch.testing.assert_close(packed[7:], expected, **TOLERANCE)
    later = scratch(torch.cat((one[:5], two[:4]))[None])[0]
    torch.testing.assert_close(later[:5], expected[:5], **TOLERANCE)
    assert (later[5:] - expected[5:]).abs().max() > 0.1


@torch.inference_mode()
def test_attention_is_bidirectional_within_a_group_and_causal_elsewhere(scratch):
    """Tokens 3 to 6 are an image: a change of its last token changes the hidden states from its
    first token on, and none before."""
    ids, groups = random_ids(1, 10), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 0, 0, 0]])
    embeddings = scratch.embed_tokens(ids)

    def change(index: int, groups: Tensor | None) -> Tensor:
        other = embeddings.clone()
        other[0, index] += torch.randn(other.shape[2], generator=torch.Generator().manual_seed(1))
        before, after = (scratch.hidden_states(one, groups=groups) for one in (embeddings, other))
        return (before - after)[0].abs().amax(dim=-1) > 1e-3

    assert change(6, groups).tolist() == [False] * 3 + [True] * 7
    assert change(6, None).tolist() == [False] * 6 + [True] * 4
    assert change(8, groups).tolist() == [False] * 8 + [True] * 2
    assert change(2, groups).tolist() == [False] * 2 + [True] * 8
    # Groups of one token each change nothing.
    one_each = torch.tensor([[0, 0, 0, 1, 2, 3, 4, 0, 0, 0]])
    single = scratch.hidden_states(embeddings, groups=one_each)
    torch.testing.assert_close(single, scratch.hidden_states(embeddings), **TOLERANCE)
    # Left padding shifts groups and tokens alike, and passes with a cache give the same states.
    padded = torch.cat((torch.zeros_like(embeddings[:, :2]), embeddings), dim=1)
    mask = torch.tensor([[0, 0] + [1] * 10])
    expected = scratch.hidden_states(embeddings, groups=groups)
    shifted = scratch.hidden_states(padded, mask, groups=torch.cat((groups[:, :2], groups), dim=1))
    torch.testing.assert_close(shifted[:, 2:], expected, **TOLERANCE)
    cache = scratch.new_cache(1, 10)
    pieces = [scratch.hidden_states(embeddings[:, :7], cache=cache, groups=groups[:, :7])]
    pieces += [
        scratch.hidden_states(embeddings[:, [index]], cache=cache, groups=groups[:, : index + 1])
        for index in (7, 8, 9)
    ]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, **TOLERANCE)


def test_dropout_follows_the_embeddings_and_both_residual_branches_in_training_only():
    torch.manual_seed(0)
    model, ids = from_scratch(dataclasses.replace(SCRATCH, dropout=0.25)), random_ids(2, 9)
    plain = from_scratch(SCRATCH)
    in_training, in_eval_mode = plain.train()(ids), plain.eval()(ids)
    assert torch.equal(model(ids), in_eval_mode) and torch.equal(in_training, in_eval_mode)
    shares = []

    def record(module: torch.nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        shares.append(((output == 0) & (inputs[0] != 0)).float().mean())

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(record)
    model.train()
    assert not torch.equal(model(ids), model(ids))
    assert len(shares) == 2 * (1 + 2 * 3) and 0.2 < torch.stack(shares).mean() < 0.3


def test_each_layer_has_a_balance_loss_in_training_with_a_gradient_for_its_router():
    model, ids, mask = from_scratch(SCRATCH), random_ids(2, 9), padding([9, 4], 9, left=False)
    model.hidden_states(model.embed_tokens(ids), mask)
    assert take_balance_loss(model) is None
    model.train()
    model.hidden_states(model.embed_tokens(ids), mask)
    balance = [block.mlp.balance_loss for block in model.blocks]
    assert len(balance) == 3 and all(loss.item() >= 0.9 for loss in balance)
    total = take_balance_loss(model)
    assert total == sum(balance) and take_balance_loss(model) is None
    total.backward()
    assert all(block.mlp.router.weight.grad.any() for block in model.blocks)
    other = ids.clone()
    other[1, 4:] = 0
    model.hidden_states(model.embed_tokens(other), mask)
    again = [block.mlp.balance_loss for block in model.blocks]
    torch.testing.assert_close(again, balance)  # the tokens at padding do not count


def test_a_text_longer_than_the_position_table_is_refused_but_not_a_long_packed_row():
    model = from_scratch(GPT).train()
    message = "a text of 25 tokens exceeds the language model's 24 positions; shorten it"
    with pytest.raises(NanoVLMError, match=message):
        model(random_ids(1, 25))
    with pytest.raises(NanoVLMError, match="a text of 25 tokens"):
        model(random_ids(1, 30), padding([25], 30, left=True))
    packed = torch.tensor([[1] * 20 + [SEGMENT + 1] * 20])
    assert model(random_ids(1, 40), packed).shape == (1, 40, 97)


def test_a_language_model_trained_from_scratch_is_saved_and_loaded(scratch, tmp_path):
    save_language_model(scratch, tmp_path)
    loaded = load_language_model(tmp_path)
    assert loaded.config == scratch.config
    assert loaded.state_dict().keys() == scratch.state_dict().keys()
    assert torch.equal(loaded(random_ids(1, 9)), scratch(random_ids(1, 9)))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_expert": 4}))
    with pytest.raises(NanoVLMError, match="unknown key 'num_expert'; did you mean 'num_experts'"):
        load_language_model(tmp_path)


def test_initial_weights_have_the_standard_deviations_of_gpt2():
    torch.manual_seed(0)
    wider = dict(hidden_size=128, num_attention_heads=16, num_key_value_heads=16)
    model = LanguageModel(dataclasses.replace(SCRATCH, **wider))
    block = model.blocks[0]
    for parameter, expected in (
        (model.embed_tokens.weight, 0.02),
        (model.position_embedding.weight, 0.02),
        (block.attention.q_proj.weight, 0.02),
        (block.attention.out_proj.weight, 0.02 / 6**0.5),
        (block.mlp.experts[3].up_proj.weight, 0.02),
        (block.mlp.router.weight, 0.02),
        (block.mlp.experts[3].down_proj.weight, 0.02 / 6**0.5),
    ):
        assert float(parameter.detach().std()) == pytest.approx(expected, rel=0.1)
    biases = (block.mlp.experts[0].up_proj.bias, block.attention.out_proj.bias)
    assert not any(bias.any() for bias in biases)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"norm": "batch"}, "norm is 'batch'; take one of rms, layer"),
        ({"positions": "alibi"}, "positions is 'alibi'; take one of rotary, learned"),
        ({"mlp": "relu"}, "mlp is 'relu'; take one of gated, gelu"),
        ({"dropout": 1.0}, "dropout is 1.0; it has to be below 1"),
        (
            {"tie_word_embeddings": True},
            "an output head of width 32 cannot be an embedding table of width 40",
        ),
        ({"experts_per_token": 5}, "experts_per_token is 5 and there are 4 experts"),
        ({"num_shared_experts": -1}, "num_shared_experts is -1; it has to be 0 or more"),
    ],
)
def test_an_invalid_config_is_refused(changes, message):
    with pytest.raises(NanoVLMError, match=message):
        dataclasses.replace(SCRATCH, **changes)
