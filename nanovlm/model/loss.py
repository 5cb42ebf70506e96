"""Cross entropy and log-probabilities over a large vocabulary without ever holding all logits."""

import torch
from torch import Tensor

CHUNK = 128  # rows of logits held at once: 128 × 151,936 in fp32 is 78 MB


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and both gradients chunk by chunk in the forward pass, where the logits are at hand (Wijmans et al. 2024;
    Hsu et al. 2024). The backward pass only scales them."""

    @staticmethod
    def forward(ctx, hidden_states: Tensor, weight: Tensor, targets: Tensor, learn: bool) -> Tensor:
        device = hidden_states.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else hidden_states.dtype
        rows, matrix = hidden_states.to(dtype), weight.to(dtype)
        learn_hidden, learn_weight = (
            learn and ctx.needs_input_grad[0],
            learn and ctx.needs_input_grad[1],
        )
        grad_hidden = torch.empty_like(rows) if learn_hidden else None
        grad_weight = torch.zeros_like(matrix) if learn_weight else None
        loss = torch.zeros((), dtype=torch.float32, device=device)
        # All chunks share these two buffers: fresh memory of this size costs more than the arithmetic on it.
        shape = min(CHUNK, len(targets)), len(weight)
        all_logits = torch.empty(shape, dtype=torch.float32, device=device)
        all_products = (
            all_logits if dtype == torch.float32 else torch.empty(shape, dtype=dtype, device=device)
        )
        for start in range(0, len(targets), CHUNK):
            chunk, target = rows[start : start + CHUNK], targets[start : start + CHUNK, None]
            products, logits = all_products[: len(target)], all_logits[: len(target)]
            logits.copy_(torch.mm(chunk, matrix.T, out=products))
            torch.log_softmax(logits, dim=-1, out=logits)
            loss -= logits.gather(1, target).sum()
            if not (learn_hidden or learn_weight):
                continue
            # d loss / d logits = softmax − one-hot
            logits.exp_().scatter_add_(1, target, logits.new_full(target.shape, -1.0))
            gradient = products.copy_(logits)
            if learn_hidden:
                torch.mm(gradient, matrix, out=grad_hidden[start : start + CHUNK])
            if learn_weight:
                grad_weight.addmm_(gradient.T, chunk)
        ctx.save_for_backward(*(grad for grad in (grad_hidden, grad_weight) if grad is not None))
        ctx.learned, ctx.dtypes = (learn_hidden, learn_weight), (hidden_states.dtype, weight.dtype)
        return loss

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        gradients = iter(ctx.saved_tensors)
        grad_hidden, grad_weight = (next(gradients) if learned else None for learned in ctx.learned)
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grad_loss.to(grad_hidden.dtype)).to(ctx.dtypes[0])
        if grad_weight is not None:
            grad_weight = grad_weight.to(ctx.dtypes[1]).mul_(
                grad_loss
            )  # in place: it is as large as the head itself
        return grad_hidden, grad_weight, None, None


def chunked_cross_entropy(hidden_states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The summed cross entropy of `hidden_states @ weight.T` against `targets`, a scalar in fp32.

    `hidden_states` (M, C), `weight` (V, C), `targets` (M,) token ids. The products are taken in autocast's
    dtype, or without it in that of `hidden_states`; the softmax in fp32. One backward pass only: it reuses the
    gradients' memory.
    """
    return _ChunkedCrossEntropy.apply(hidden_states, weight, targets, torch.is_grad_enabled())


class _TokenLogProbabilities(torch.autograd.Function):
    """Keeps no logits: what each token's gradient is multiplied by is known only once the forward pass is over, so the
    backward pass makes them anew."""

    @staticmethod
    def forward(ctx, hidden_states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        device = hidden_states.device
        ctx.dtype = (
            torch.get_autocast_dtype(device.type)
            if torch.is_autocast_enabled(device.type)
            else hidden_states.dtype
        )
        ctx.save_for_backward(hidden_states, weight, targets)
        rows, matrix = hidden_states.to(ctx.dtype), weight.to(ctx.dtype)
        log_probabilities = torch.empty(len(targets), dtype=torch.float32, device=device)
        for start in range(0, len(targets), CHUNK):
            chunk = slice(start, start + CHUNK)
            logits = torch.mm(rows[chunk], matrix.T).float()
            log_probabilities[chunk] = logits.gather(1, targets[chunk, None])[
                :, 0
            ] - logits.logsumexp(dim=-1)
        return log_probabilities

    @staticmethod
    def backward(ctx, grad: Tensor):
        hidden_states, weight, targets = ctx.saved_tensors
        rows, matrix = hidden_states.to(ctx.dtype), weight.to(ctx.dtype)
        learn_hidden, learn_weight, _ = ctx.needs_input_grad
        grad_rows = torch.empty_like(rows) if learn_hidden else None
        grad_matrix = torch.zeros_like(matrix) if learn_weight else None
        for start in range(0, len(targets), CHUNK):
            chunk = slice(start, start + CHUNK)
            factor = grad[chunk, None]
            # d log p / d logits = one-hot − softmax
            probabilities = torch.mm(rows[chunk], matrix.T).float().softmax(dim=-1)
            gradient = (
                probabilities.mul_(-factor)
                .scatter_add_(1, targets[chunk, None], factor)
                .to(ctx.dtype)
            )
            if learn_hidden:
                torch.mm(gradient, matrix, out=grad_rows[chunk])
            if learn_weight:
                grad_matrix.addmm_(gradient.T, rows[chunk])
        return (
            grad_rows.to(hidden_states.dtype) if learn_hidden else None,
            grad_matrix.to(weight.dtype) if learn_weight else None,
            None,
        )


def token_log_probabilities(hidden_states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The log-probability, in nats, of each of `targets` under `softmax(hidden_states @ weight.T)`: (M,) in fp32.

    Arguments and number formats as in `chunked_cross_entropy`, of which this is the negative before the sum. A backward
    pass takes the output head's products once more, and no logits are kept between the two.
    """
    return _TokenLogProbabilities.apply(hidden_states, weight, targets)
