"""Compiled steps with a static cache: the logits and answers of the plain ones, in one graph."""

import copy
import dataclasses
import importlib
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._inductor.utils import run_and_get_code

from nanovlm.errors import NanoVLMError
from nanovlm.generate import (
    SMALLEST_CACHE,
    CompiledSteps,
    Prompt,
    Steps,
    compile_decoding,
    decode,
    next_logits,
)
from nanovlm.model.language_model import LanguageModel, LanguageModelConfig
from nanovlm.model.layers import RMSNorm
from nanovlm.sampling import Sampling
from tests.reference.models import randomise

CONFIG = LanguageModelConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=600,
)
VARIANTS = {
    "grouped heads": {},
    "qk norm, no bias": dict(qk_norm=True, qkv_bias=False, tie_word_embeddings=False),
    "gpt-2": dict(positions="learned", norm="layer", mlp="gelu", mlp_bias=True, output_bias=True),
    "llama 3": dict(
        rope_type="llama3", rope_factor=8.0, original_max_position_embeddings=16, rope_theta=1e4
    ),
    "first qwen": dict(
        rope_type="dynamic_ntk", original_max_position_embeddings=8, logn_attention=True
    ),
    "reducer": dict(embedding_size=40, reducer_size=12, tie_word_embeddings=False),
    "experts": dict(num_experts=3),
}


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return build(**VARIANTS[request.param])


def build(**changes) -> LanguageModel:
    model = LanguageModel(dataclasses.replace(CONFIG, **changes)).eval()
    randomise(model, seed=1)
    return model


@pytest.fixture
def uncompiled(monkeypatch) -> None:
    """Steps run as they are written, which is quick and shows what the static cache computes."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.fixture
def counter(monkeypatch) -> CompileCounter:
    """A backend that counts the captured graphs and runs them as they are."""
    counter, compile = CompileCounter(), torch.compile
    torch.compiler.reset()

    def capture(function, mode=None, **options):
        return compile(function, backend=counter, **options)

    monkeypatch.setattr(torch, "compile", capture)
    return counter


def make_prompt(
    model: LanguageModel, lengths: list[int], pad_left: bool = True, grouped: bool = False
) -> Prompt:
    """Random rows of these lengths; with `grouped`, tokens 1 to 4 attend to each other."""
    longest = max(lengths)
    ids = torch.randint(97, (len(lengths), longest), generator=torch.Generator().manual_seed(3))
    mask, groups = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        start = longest - length if pad_left else 0
        mask[row, start : start + length] = 1
        groups[row, start + 1 : start + 4] = 1
    return Prompt(model.embed_tokens(ids), ids, mask, groups if grouped else None)


def forced_logits(steps: Steps | CompiledSteps, prompt: Prompt, tokens: Tensor) -> Tensor:
    """The logits after `prompt` and after each of (N, B) `tokens`: (N + 1, B, V)."""
    with torch.inference_mode():
        logits = [steps.begin(prompt, prompt.input_ids.shape[1] + len(tokens)).clone()]
        logits += [steps.add(token).clone() for token in tokens]
    return torch.stack(logits)


@pytest.mark.parametrize("pad_left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("grouped", [False, True], ids=["causal", "grouped"])
def test_a_static_cache_gives_the_same_logits(model, uncompiled, pad_left, grouped):
    with torch.no_grad():
        prompt = make_prompt(model, [9, 4, 12], pad_left, grouped)
    tokens = torch.randint(97, (20, 3), generator=torch.Generator().manual_seed(4))
    expected = forced_logits(Steps(model), prompt, tokens)
    ours = forced_logits(CompiledSteps(model), prompt, tokens)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.1


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(repetition_penalty=1.4), Sampling(1.0, top_p=0.9, top_k=20)],
    ids=["greedy", "penalty", "sampled"],
)
def test_a_static_cache_gives_the_same_answers(model, uncompiled, sampling):
    """Also when it is kept for the next prompts: shorter, with fewer rows, and then longer ones."""
    compiled = copy.deepcopy(model)
    compile_decoding(compiled)
    for lengths in ([9, 4, 12], [5], [7, 7], [200, 240, 3, 100], [250]):
        with torch.no_grad():
            prompt = make_prompt(model, lengths)
            if len(lengths) == 1:
                prompt.attention_mask = None
        expected, ours = (
            list(decode(one, prompt, 24, {96}, sampling)) for one in (model, compiled)
        )
        assert ours == expected
        assert len(set(next(zip(*expected)))) > 10 or not sampling.temperature


def test_steps_are_one_graph_for_all_tokens_and_for_prompts_that_fit(counter):
    model = build()
    compile_decoding(model)
    counter.frame_count = 0  # without the trial
    counts = []
    for lengths in ([9, 4, 12], [5, 30, 8], [60, 61], [SMALLEST_CACHE, 20, 9], [400, 3]):
        with torch.no_grad():
            prompt = make_prompt(model, lengths)
        list(decode(model, prompt, 20, ()))
        counts.append(counter.frame_count)
    assert counts == [1, 1, 1, 2, 2]  # the fourth needs more than SMALLEST_CACHE places
    assert model.compiled_steps.cache.max_length == 2 * SMALLEST_CACHE


@pytest.mark.slow
def test_a_step_of_24_blocks_is_about_half_as_many_kernels(monkeypatch):
    """For a CPU, and counted at 2 and 4 blocks. As it is written it is 754 kernels on CUDA."""
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        pytest.skip("no C++ compiler here")

    def norm(self, hidden_states: Tensor) -> Tensor:  # CUDA has a kernel for it
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)

    monkeypatch.setattr(RMSNorm, "forward", norm)
    counts = []
    for layers in (2, 4):
        model = build(num_hidden_layers=layers)
        torch.compiler.reset()
        step = torch.compile(next_logits, fullgraph=True, dynamic=False)
        with torch.inference_mode():
            steps = CompiledSteps(model)
            steps.begin(make_prompt(model, [9]), 40)
            _, (code,) = run_and_get_code(step, model, torch.tensor([3]), steps.cache)
        counts.append(len(re.findall(r"^ +(?:extern_kernels\.|cpp_fused)", code, re.MULTILINE)))
    per_block = (counts[1] - counts[0]) / 2
    assert per_block <= 16 and counts[0] + 22 * per_block <= 386


def test_a_step_changes_no_address(uncompiled):
    """CUDA graphs read and write the addresses that they were recorded with."""
    model = build()
    steps = CompiledSteps(model)
    with torch.inference_mode():
        steps.begin(make_prompt(model, [4, 6]), 20)
        cache = steps.cache
        tensors = [*cache.keys, *cache.values, cache.attention_mask, cache.place]
        addresses = [tensor.data_ptr() for tensor in tensors]
        steps.add(torch.tensor([1, 2]))
        steps.begin(make_prompt(model, [3]), 30)
        steps.add(torch.tensor([1]))
    assert [tensor.data_ptr() for tensor in tensors] == addresses and steps.cache is cache


def test_what_an_earlier_answer_left_behind_does_no_harm(uncompiled):
    model = build()
    steps, prompt = CompiledSteps(model), make_prompt(model, [4, 6])
    tokens = torch.randint(97, (5, 2), generator=torch.Generator().manual_seed(4))
    expected = forced_logits(steps, prompt, tokens)
    with torch.inference_mode():
        for tensor in (*steps.cache.keys, *steps.cache.values):
            tensor.fill_(torch.nan)
    assert torch.equal(forced_logits(steps, prompt, tokens), expected)


def test_where_compiling_fails_steps_go_on_as_written_and_say_so_once(monkeypatch, capsys):
    def backend(graph, inputs):
        raise RuntimeError("no Triton")

    model, compile = build(), torch.compile
    torch.compiler.reset()
    with torch.no_grad():
        prompt = make_prompt(model, [4, 6])
    expected = list(decode(model, prompt, 10, ()))
    monkeypatch.setattr(importlib.import_module("nanovlm.generate"), "require_compiler", id)
    monkeypatch.setattr(
        torch,
        "compile",
        lambda function, mode, **options: compile(function, backend=backend, **options),
    )
    compile_decoding(model)
    assert list(decode(model, prompt, 10, ())) == expected
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("decoding: not compiled from here on (")
    assert "no Triton" in said[0]


def test_without_a_compiler_the_error_is_one_line(monkeypatch):
    module = importlib.import_module("nanovlm.utils.compiler")
    monkeypatch.setattr(module, "compiler_problem", lambda device: "no compiler here")
    with pytest.raises(NanoVLMError, match="^--compile: no compiler here, or leave --compile out$"):
        compile_decoding(build())


@pytest.mark.gpu
def test_a_gpu_gives_the_logits_and_answers_of_the_cpu(model):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    on_gpu = copy.deepcopy(model).cuda()
    compile_decoding(on_gpu)
    with torch.no_grad():
        prompt = make_prompt(model, [9, 4, 12])
    tensors = prompt.embeddings, prompt.input_ids, prompt.attention_mask
    moved = Prompt(*(tensor.cuda() for tensor in tensors))
    tokens = torch.randint(97, (20, 3), generator=torch.Generator().manual_seed(4))
    expected = forced_logits(Steps(model), prompt, tokens)
    ours = forced_logits(on_gpu.compiled_steps, moved, tokens.cuda())
    torch.testing.assert_close(ours.cpu(), expected, atol=1e-3, rtol=1e-3)
    assert list(decode(on_gpu, moved, 24, {96})) == list(decode(model, prompt, 24, {96}))
