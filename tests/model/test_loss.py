"""The chunked cross entropy and token log-probabilities against PyTorch's, values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nanovlm.model import loss
from nanovlm.model.language_model import LanguageModel, LanguageModelConfig
from nanovlm.model.loss import chunk_rows, chunked_cross_entropy, token_log_probabilities

VOCABULARY, WIDTH = 61, 12
CHUNK = chunk_rows(VOCABULARY, torch.float32, torch.device("cpu"))


def inputs(rows: int, vocabulary: int = VOCABULARY) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hidden_states = torch.randn(rows, WIDTH, generator=generator)
    weight = torch.randn(vocabulary, WIDTH, generator=generator)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    return hidden_states.requires_grad_(), weight.requires_grad_(), targets


@pytest.mark.parametrize(
    "rows, vocabulary",
    [
        (1, 61),
        (2, 61),
        (CHUNK - 1, 61),
        (CHUNK, 61),
        (CHUNK + 1, 61),
        (2 * CHUNK + 77, 61),
        (5 * CHUNK, 3),
        (CHUNK + 3, 5003),
    ],
)
def test_loss_and_gradients_equal_pytorch(rows, vocabulary):
    hidden_states, weight, targets = inputs(rows, vocabulary)
    expected = F.cross_entropy(hidden_states @ weight.T, targets, reduction="sum")
    # The loss is scaled, as gradient accumulation does.
    expected_gradients = torch.autograd.grad(expected / 3, (hidden_states, weight))
    ours = chunked_cross_entropy(hidden_states, weight, targets)
    assert ours.shape == () and ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    gradients = torch.autograd.grad(ours / 3, (hidden_states, weight))
    torch.testing.assert_close(gradients, expected_gradients, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("trainable", ["hidden_states", "weight"])
def test_only_the_trainable_input_gets_a_gradient(trainable):
    hidden_states, weight, targets = inputs(300)
    expected = torch.autograd.grad(
        F.cross_entropy(hidden_states @ weight.T, targets, reduction="sum"),
        hidden_states if trainable == "hidden_states" else weight,
    )[0]
    hidden_states.requires_grad_(trainable == "hidden_states")
    weight.requires_grad_(trainable == "weight")
    chunked_cross_entropy(hidden_states, weight, targets).backward()
    gradients = {"hidden_states": hidden_states.grad, "weight": weight.grad}
    torch.testing.assert_close(gradients.pop(trainable), expected, atol=1e-5, rtol=1e-5)
    assert list(gradients.values()) == [None]


def test_a_tied_head_gets_the_gradients_of_both_its_uses():
    _, weight, targets = inputs(40)
    ids = torch.arange(40) % VOCABULARY

    def gradient(entropy) -> Tensor:
        return torch.autograd.grad(entropy(F.embedding(ids, weight).tanh()), weight)[0]

    expected = gradient(lambda hidden: F.cross_entropy(hidden @ weight.T, targets, reduction="sum"))
    ours = gradient(lambda hidden: chunked_cross_entropy(hidden, weight, targets))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_logits_are_computed_one_chunk_at_a_time(monkeypatch):
    rows = 2 * CHUNK + 5
    hidden_states, weight, targets = inputs(rows)
    shapes, log_softmax = [], torch.log_softmax

    def recorded(logits: Tensor, **options) -> Tensor:
        shapes.append(logits.shape)
        return log_softmax(logits, **options)

    monkeypatch.setattr(torch, "log_softmax", recorded)
    chunked_cross_entropy(hidden_states, weight, targets)
    assert shapes == [(CHUNK, VOCABULARY), (CHUNK, VOCABULARY), (5, VOCABULARY)]


def test_without_gradients_and_without_targets():
    hidden_states, weight, targets = inputs(10)
    with torch.no_grad():
        ours = chunked_cross_entropy(hidden_states, weight, targets)
    expected = F.cross_entropy(hidden_states @ weight.T, targets, reduction="sum").detach()
    torch.testing.assert_close(ours, expected)
    empty = chunked_cross_entropy(hidden_states[:0], weight, targets[:0])
    empty.backward()
    assert empty.item() == 0 and not hidden_states.grad.any() and not weight.grad.any()


def test_large_logits_stay_finite():
    hidden_states, weight, targets = inputs(8)
    ours = chunked_cross_entropy(hidden_states * 1e3, weight, targets)
    expected = F.cross_entropy(hidden_states * 1e3 @ weight.T, targets, reduction="sum")
    torch.testing.assert_close(ours, expected)


def test_bfloat16_activations_and_an_fp32_head():
    hidden_states, weight, targets = inputs(400)
    expected = F.cross_entropy(hidden_states @ weight.T, targets, reduction="sum")
    expected_gradients = torch.autograd.grad(expected, (hidden_states, weight))
    half = hidden_states.detach().bfloat16().requires_grad_()
    ours = chunked_cross_entropy(half, weight, targets)
    ours.backward()
    assert half.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=0)
    for gradient, expected_gradient in zip((half.grad, weight.grad), expected_gradients):
        error = (gradient - expected_gradient).norm() / expected_gradient.norm()
        assert error < 0.01


def test_autocast_multiplies_in_bfloat16_and_gives_fp32_gradients():
    hidden_states, weight, targets = inputs(200)
    expected = torch.autograd.grad(
        chunked_cross_entropy(hidden_states, weight, targets), (hidden_states, weight)
    )
    with torch.autocast("cpu", torch.bfloat16):
        ours = chunked_cross_entropy(hidden_states, weight, targets)
    ours.backward()
    for gradient, exact in zip((hidden_states.grad, weight.grad), expected):
        assert gradient.dtype == torch.float32
        assert 0 < (gradient - exact).norm() / exact.norm() < 0.01


class Allocations(TorchDispatchMode):
    """Collects the shapes of all tensors allocated while it is active; views of the `known` tensors
    are left out."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.shapes: list[torch.Size] = []
        self.tensors: list[Tensor] = []  # kept, so that no address is used twice

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.shapes.append(tensor.shape)
                self.tensors.append(tensor.detach())
        return result


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_no_tensor_holds_the_logits_of_all_tokens_forward_or_backward(tied, trained):
    """Through a language model whose head is trained with its block or frozen: the gradients equal
    those of plain cross entropy, and the largest tensor holds one chunk of logits."""
    torch.manual_seed(0)
    rows, vocabulary, width = 4 * CHUNK, 5003, 16
    model = LanguageModel(
        LanguageModelConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            tie_word_embeddings=tied,
        )
    )
    model.embed_tokens.requires_grad_(tied and trained)
    model.head_weight.requires_grad_(trained)
    ids, targets = torch.randint(vocabulary, (2, 8, rows // 8))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def hidden_states() -> Tensor:
        return model.hidden_states(model.embed_tokens(ids)).flatten(0, 1)

    plain = F.cross_entropy(model.logits(hidden_states()), targets.flatten(), reduction="sum")
    expected = torch.autograd.grad(plain, trainable)
    with Allocations(*model.parameters()) as allocations:
        entropy = chunked_cross_entropy(hidden_states(), model.head_weight, targets.flatten())
        ours = torch.autograd.grad(entropy, trainable)
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)
    shapes = allocations.shapes
    assert max(shape.numel() for shape in shapes) == CHUNK * vocabulary
    assert shapes.count((CHUNK, vocabulary)) and not shapes.count((rows, vocabulary))
    # A frozen head has no gradient.
    assert any(shape.numel() == vocabulary * width for shape in shapes) == trained


@pytest.mark.parametrize("rows", [0, 1, CHUNK, 2 * CHUNK + 77])
def test_token_log_probabilities_and_gradients_equal_pytorch(rows):
    """Each token's gradient has a factor of its own, as in preference training."""
    hidden_states, weight, targets = inputs(rows)
    factors = torch.randn(rows, generator=torch.Generator().manual_seed(1))
    expected = (hidden_states @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    ours = token_log_probabilities(hidden_states, weight, targets)
    assert ours.shape == (rows,) and ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    gradients, expected_gradients = (
        torch.autograd.grad((values * factors).sum(), (hidden_states, weight))
        for values in (ours, expected)
    )
    torch.testing.assert_close(gradients, expected_gradients, atol=1e-5, rtol=1e-5)
    # The gradients stay the same where only one of the two inputs is trainable.
    cases = ((hidden_states, weight.detach()), (hidden_states.detach(), weight))
    for index, arguments in enumerate(cases):
        values = token_log_probabilities(*arguments, targets)
        gradient = torch.autograd.grad(values @ factors, arguments[index])[0]
        torch.testing.assert_close(gradient, expected_gradients[index], atol=1e-5, rtol=1e-5)


def test_token_log_probabilities_save_no_logits_for_the_backward_pass():
    hidden_states, weight, targets = inputs(3 * CHUNK, 501)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        token_log_probabilities(hidden_states, weight, targets)
    assert max(saved) == 501 * WIDTH  # the head's weight; a chunk of logits has 501 · CHUNK numbers


def test_token_log_probabilities_under_autocast():
    hidden_states, weight, targets = inputs(200)
    expected = (hidden_states @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    with torch.autocast("cpu", torch.bfloat16):
        ours = token_log_probabilities(hidden_states, weight, targets)
    torch.testing.assert_close(ours, expected, atol=0.1, rtol=0.02)
    gradients, expected_gradients = (
        torch.autograd.grad(values.sum(), (hidden_states, weight)) for values in (ours, expected)
    )
    for gradient, exact in zip(gradients, expected_gradients):
        error = float((gradient - exact).norm() / exact.norm())
        assert gradient.dtype == torch.float32 and error < 0.02


def zipf_labels(count: int, vocabulary: int) -> Tensor:
    """Token ids as frequent as the words of a text."""
    return torch.multinomial(1.0 / torch.arange(1, vocabulary + 1), count, replacement=True)


def gradients_in(dtype: torch.dtype, function, inputs, factor) -> tuple[Tensor, Tensor]:
    """Those of hidden states and head, with products in `dtype` and the rest in fp32."""
    hidden_states, weight, targets = inputs
    hidden_states, weight = hidden_states.clone().requires_grad_(), weight.clone().requires_grad_()
    with torch.autocast(hidden_states.device.type, dtype, enabled=dtype != torch.float32):
        values = function(hidden_states, weight, targets)
    (values * factor).sum().backward()
    assert hidden_states.grad is not None and weight.grad is not None
    return hidden_states.grad, weight.grad


def relative_errors(gradients: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[float]:
    return [float((ours - right).norm() / right.norm()) for ours, right in zip(gradients, exact)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("rows", [512, 4096, 32768])
def test_the_gradient_of_the_head_is_summed_in_fp32(rows, dtype, monkeypatch):
    """Summed in bf16, 128 labels at a time, it is off by 0.6 % at 4,096 labels, by 1.9 % at 32,768.

    Hidden states have a mean, as after a norm with weights: the sum grows with every label."""
    torch.manual_seed(0)
    monkeypatch.setattr(loss, "CPU_SLICE", 100 * 64)  # 100 rows of the head at a time, then 56
    inputs = torch.randn(rows, 64) + 0.5, torch.randn(256, 64) * 0.02, zipf_labels(rows, 256)
    for function, factor in (
        (chunked_cross_entropy, torch.tensor(1 / rows)),
        (token_log_probabilities, torch.linspace(-1, 2, rows)),
    ):
        exact = gradients_in(torch.float32, function, inputs, factor)
        ours = gradients_in(dtype, function, inputs, factor)
        assert max(relative_errors(ours, exact)) < 0.005


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
@pytest.mark.parametrize("function", [chunked_cross_entropy, token_log_probabilities])
def test_no_product_overflows_in_fp16(function, scale):
    """With one wide dimension, as trained language models have, at any loss scale."""
    torch.manual_seed(0)
    rows = 8192
    hidden_states, weight = torch.randn(rows, 64), torch.randn(256, 64) * 0.02
    hidden_states[:, 0] += 60
    inputs = hidden_states, weight, zipf_labels(rows, 256)
    for factor in (scale, scale / rows):
        exact = gradients_in(torch.float32, function, inputs, factor)
        ours = gradients_in(torch.float16, function, inputs, factor)
        assert max(relative_errors(ours, exact)) < 0.005
        if factor == scale:  # so that fp16 would overflow indeed
            assert exact[1].abs().max() > torch.finfo(torch.float16).max


def test_logits_and_hidden_states_beyond_fp16_stay_finite():
    hidden_states, weight, targets = inputs(8)
    hidden_states = hidden_states.detach() * 1e5
    with torch.autocast("cpu", torch.float16):
        ours = chunked_cross_entropy(hidden_states, weight, targets)
        zero = token_log_probabilities(hidden_states * 0, weight, targets)
    expected = F.cross_entropy(hidden_states @ weight.T, targets, reduction="sum")
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=0)
    assert expected > 65504
    torch.testing.assert_close(zero.exp(), torch.full((8,), 1 / VOCABULARY))
    # A gradient of nothing but zeros stays one, and what is not finite stays visible.
    gradient = torch.autograd.grad(zero @ torch.zeros(8), weight)[0]
    assert not gradient.any()
    with torch.autocast("cpu", torch.float16):
        assert not chunked_cross_entropy(hidden_states * torch.inf, weight, targets).isfinite()


@pytest.mark.parametrize("function", [chunked_cross_entropy, token_log_probabilities])
def test_a_16_bit_gradient_needs_no_second_copy_of_the_head(function, monkeypatch):
    """As large as the head are its copy in bf16 and its gradient in fp32, no more."""
    monkeypatch.setattr(loss, "CPU_SLICE", 1000 * WIDTH)
    hidden_states, weight, targets = inputs(300, 5003)
    hidden_states = hidden_states.detach()
    with torch.autocast("cpu", torch.bfloat16):
        values = function(hidden_states, weight, targets)
        with Allocations(hidden_states, weight, targets) as allocations:
            function(hidden_states, weight, targets).sum().backward()
    assert values.isfinite().all()
    large = [tensor for tensor in allocations.tensors if tensor.shape == weight.shape]
    dtypes = {tensor.untyped_storage().data_ptr(): tensor.dtype for tensor in large}.values()
    passes = 2 if function is token_log_probabilities else 1  # casts the head in both passes
    assert sorted(map(str, dtypes)) == ["torch.bfloat16"] * passes + ["torch.float32"]


@pytest.mark.parametrize("vocabulary", [64, 32_000, 151_936, 10**7])
def test_a_chunk_on_a_gpu_is_bounded_in_bytes(vocabulary):
    for dtype, size in ((torch.bfloat16, 6), (torch.float32, 4)):
        rows = chunk_rows(vocabulary, dtype, torch.device("cuda"))
        assert rows % 64 == 0
        assert rows == 64 or loss.GPU_BYTES / 2 < rows * vocabulary * size <= loss.GPU_BYTES


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("function", [chunked_cross_entropy, token_log_probabilities])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_gpu_gives_the_gradients_of_the_cpu(function, dtype, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(loss, "GPU_BYTES", 2**20)
    rows = 4096
    inputs = torch.randn(rows, 64) + 0.5, torch.randn(2048, 64) * 0.02, zipf_labels(rows, 2048)
    exact = gradients_in(torch.float32, function, inputs, 2.0**16)
    on_gpu = tuple(tensor.cuda() for tensor in inputs)
    ours = gradients_in(dtype, function, on_gpu, 2.0**16)
    assert max(relative_errors(tuple(gradient.cpu() for gradient in ours), exact)) < 0.005
