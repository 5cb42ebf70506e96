"""Cross entropy and log-probabilities over a large vocabulary, without ever holding all logits."""

import torch
from torch import Tensor

CHUNK = 128  # rows of logits held at once: 128 × 151,936 in fp32 is 78 MB


def _compute_dtype(hidden_states: Tensor) -> torch.dtype:
    device = hidden_states.device.type
    autocast = torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else hidden_states.dtype


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and both gradients, chunk by chunk in the forward pass, where the logits exist.

    Wijmans et al. 2024; Hsu et al. 2024. The backward pass only scales the gradients.
    """

    @staticmethod
    def forward(ctx, hidden_states: Tensor, weight: Tensor, targets: Tensor, train: bool) -> Tensor:
        device, dtype = hidden_states.device, _compute_dtype(hidden_states)
        rows, matrix = hidden_states.to(dtype), weight.to(dtype)
        grad_rows = torch.empty_like(rows) if train and ctx.needs_input_grad[0] else None
        grad_matrix = torch.zeros_like(matrix) if train and ctx.needs_input_grad[1] else None
        loss = torch.zeros((), dtype=torch.float32, device=device)
        # All chunks share two buffers: allocating this much memory anew costs more than the
        # arithmetic on it.
        shape = min(CHUNK, len(targets)), len(weight)
        all_logits = torch.empty(shape, dtype=torch.float32, device=device)
        all_products = all_logits
        if dtype != torch.float32:
            all_products = torch.empty(shape, dtype=dtype, device=device)
        for start in range(0, len(targets), CHUNK):
            chunk, target = rows[start : start + CHUNK], targets[start : start + CHUNK, None]
            products, logits = all_products[: len(target)], all_logits[: len(target)]
            logits.copy_(torch.mm(chunk, matrix.T, out=products))
            torch.log_softmax(logits, dim=-1, out=logits)
            loss -= logits.gather(1, target).sum()
            if grad_rows is None and grad_matrix is None:
                continue
            # d loss / d logits = softmax − one-hot
            logits.exp_().scatter_add_(1, target, logits.new_full(target.shape, -1.0))
            gradient = products.copy_(logits)
            if grad_rows is not None:
                torch.mm(gradient, matrix, out=grad_rows[start : start + CHUNK])
            if grad_matrix is not None:
                grad_matrix.addmm_(gradient.T, chunk)
        ctx.save_for_backward(grad_rows, grad_matrix)
        ctx.dtypes = hidden_states.dtype, weight.dtype
        return loss

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        grad_rows, grad_matrix = ctx.saved_tensors
        if grad_rows is not None:
            grad_rows = (grad_rows * grad_loss.to(grad_rows.dtype)).to(ctx.dtypes[0])
        if grad_matrix is not None:  # in place: it is as large as the head itself
            grad_matrix = grad_matrix.to(ctx.dtypes[1]).mul_(grad_loss)
        return grad_rows, grad_matrix, None, None


def chunked_cross_entropy(hidden_states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The summed cross entropy of `hidden_states @ weight.T` against `targets`, a scalar in fp32.

    `hidden_states` (M, C), `weight` (V, C), `targets` (M,) token ids. Products are taken in
    autocast's dtype, or without autocast in that of `hidden_states`; the softmax in fp32. Only one
    backward pass is possible: it reuses the memory of the gradients.
    """
    return _ChunkedCrossEntropy.apply(hidden_states, weight, targets, torch.is_grad_enabled())


class _TokenLogProbabilities(torch.autograd.Function):
    """Keeps no logits: the backward pass computes them again.

    Unlike with the cross entropy, the factor of each token's gradient is not known before.
    """

    @staticmethod
    def forward(ctx, hidden_states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        ctx.dtype = _compute_dtype(hidden_states)
        ctx.save_for_backward(hidden_states, weight, targets)
        rows, matrix = hidden_states.to(ctx.dtype), weight.to(ctx.dtype)
        log_probabilities = torch.empty(len(targets), dtype=torch.float32, device=rows.device)
        for start in range(0, len(targets), CHUNK):
            chunk = slice(start, start + CHUNK)
            logits = torch.mm(rows[chunk], matrix.T).float()
            chosen = logits.gather(1, targets[chunk, None])[:, 0]
            log_probabilities[chunk] = chosen - logits.logsumexp(dim=-1)
        return log_probabilities

    @staticmethod
    def backward(ctx, grad: Tensor):
        hidden_states, weight, targets = ctx.saved_tensors
        rows, matrix = hidden_states.to(ctx.dtype), weight.to(ctx.dtype)
        grad_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        grad_matrix = torch.zeros_like(matrix) if ctx.needs_input_grad[1] else None
        for start in range(0, len(targets), CHUNK):
            chunk = slice(start, start + CHUNK)
            factor, target = grad[chunk, None], targets[chunk, None]
            # d log p / d logits = one-hot − softmax
            probabilities = torch.mm(rows[chunk], matrix.T).float().softmax(dim=-1)
            gradient = probabilities.mul_(-factor).scatter_add_(1, target, factor).to(ctx.dtype)
            if grad_rows is not None:
                torch.mm(gradient, matrix, out=grad_rows[chunk])
            if grad_matrix is not None:
                grad_matrix.addmm_(gradient.T, rows[chunk])
        return (
            None if grad_rows is None else grad_rows.to(hidden_states.dtype),
            None if grad_matrix is None else grad_matrix.to(weight.dtype),
            None,
        )


def token_log_probabilities(hidden_states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """log softmax(hidden_states @ weight.T) at each of `targets`: (M,) in fp32.

    Arguments and dtypes as in `chunked_cross_entropy`, whose result is the negative sum of this.
    The backward pass multiplies with the output head once more, so that no logits are kept between
    the passes.
    """
    return _TokenLogProbabilities.apply(hidden_states, weight, targets)
