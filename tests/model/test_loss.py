"""The chunked cross entropy and token log-probabilities against PyTorch's, values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nanovlm.model.language_model import LanguageModel, LanguageModelConfig
from nanovlm.model.loss import CHUNK, chunked_cross_entropy, token_log_probabilities

VOCABULARY, WIDTH = 61, 12


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

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.shapes.append(tensor.shape)
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
        loss = chunked_cross_entropy(hidden_states(), model.head_weight, targets.flatten())
        ours = torch.autograd.grad(loss, trainable)
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
