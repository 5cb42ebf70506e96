"""Cross entropy over a large vocabulary without ever holding all logits."""

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
        learn_hidden, learn_weight = learn and ctx.needs_input_grad[0], learn and ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(rows) if learn_hidden else None
        grad_weight = torch.zeros_like(matrix) if learn_weight else None
        loss = torch.zeros((), dtype=torch.float32, device=device)
        # All chunks share these two buffers: fresh memory of this size costs more than the arithmetic on it.
        shape = min(CHUNK, len(targets)), len(weight)
        all_logits = torch.empty(shape, dtype=torch.float32, device=device)
        all_products = all_logits if dtype == torch.float32 else torch.empty(shape, dtype=dtype, device=device)
        for start in range(0, len(targets), CHUNK):
            chunk, target = rows[start:start + CHUNK], targets[start:start + CHUNK, None]
            products, logits = all_products[:len(target)], all_logits[:len(target)]
            logits.copy_(torch.mm(chunk, matrix.T, out=products))
            torch.log_softmax(logits, dim=-1, out=logits)
            loss -= logits.gather(1, target).sum()
            if not (learn_hidden or learn_weight):
                continue
            # d loss / d logits = softmax − one-hot
            logits.exp_().scatter_add_(1, target, logits.new_full(target.shape, -1.0))
            gradient = products.copy_(logits)
            if learn_hidden:
                torch.mm(gradient, matrix, out=grad_hidden[start:start + CHUNK])
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
            grad_weight = grad_weight.to(ctx.dtypes[1]).mul_(grad_loss)  # in place: it is as large as the head itself
        return grad_hidden, grad_weight, None, None


def chunked_cross_entropy(hidden_states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The summed cross entropy of `hidden_states @ weight.T` against `targets`, a scalar in fp32.

    `hidden_states` (M, C), `weight` (V, C), `targets` (M,) token ids. The products are taken in autocast's
    dtype, or without it in that of `hidden_states`; the softmax in fp32. One backward pass only: it reuses the
    gradients' memory.
    """
    return _ChunkedCrossEntropy.apply(hidden_states, weight, targets, torch.is_grad_enabled())
