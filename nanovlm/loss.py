"""Cross entropy over a large vocabulary without ever holding all logits."""

import torch
from torch import Tensor

CHUNK = 256  # rows of logits held at once: 256 × 151,936 in fp32 is 156 MB


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and both gradients chunk by chunk in the forward pass, where the logits are at hand (Wijmans et al. 2024;
    Hsu et al. 2024). The backward pass only scales them."""

    @staticmethod
    def forward(ctx, hidden_states: Tensor, weight: Tensor, targets: Tensor, learn: bool) -> Tensor:
        dtype = hidden_states.dtype
        matrix = weight.to(dtype)
        learn_hidden, learn_weight = learn and ctx.needs_input_grad[0], learn and ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden_states) if learn_hidden else None
        grad_weight = torch.zeros_like(weight) if learn_weight else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden_states.device)
        for start in range(0, len(targets), CHUNK):
            rows, target = hidden_states[start:start + CHUNK], targets[start:start + CHUNK]
            logits = (rows @ matrix.T).float()  # (chunk, V)
            normaliser = logits.logsumexp(dim=-1, keepdim=True)
            loss += (normaliser - logits.gather(1, target[:, None])).sum()
            if learn_hidden or learn_weight:
                # d loss / d logits = softmax − one-hot
                gradient = logits.sub_(normaliser).exp_()
                gradient.scatter_add_(1, target[:, None], gradient.new_full((len(target), 1), -1.0))
                gradient = gradient.to(dtype)
                if learn_hidden:
                    grad_hidden[start:start + CHUNK] = gradient @ matrix
                if learn_weight:
                    grad_weight += gradient.T @ rows
        ctx.save_for_backward(*(grad for grad in (grad_hidden, grad_weight) if grad is not None))
        ctx.learned = learn_hidden, learn_weight
        return loss

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        gradients = iter(ctx.saved_tensors)
        grad_hidden, grad_weight = (next(gradients) if learned else None for learned in ctx.learned)
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_loss.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_loss)  # in place: it is as large as the head itself
        return grad_hidden, grad_weight, None, None


def chunked_cross_entropy(hidden_states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The summed cross entropy of `hidden_states @ weight.T` against `targets`, a scalar in fp32.

    `hidden_states` (M, C), `weight` (V, C), `targets` (M,) token ids. The product is taken in the dtype of
    `hidden_states`, the softmax in fp32. One backward pass only: it reuses the gradients' memory.
    """
    return _ChunkedCrossEntropy.apply(hidden_states, weight, targets, torch.is_grad_enabled())
