"""Cross entropy and log-probabilities over a large vocabulary, without ever holding all logits.

Lesson: lessons/source/11_loss.py.
"""

import math

import torch
from torch import Tensor

GPU_BYTES = 2**29  # of the logits held at once
CPU_SLICE, GPU_SLICE = 2**20, 2**23  # numbers of a product that stay in the processor's cache


def chunk_rows(vocabulary: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of logits held at once: in fp32 and, if `dtype` is another, in that as well.

    In 16 bits a pass over the head's gradient follows each chunk, so chunks are larger. Their size
    does not depend on the memory that happens to be free: a run adds up the same sums every time.
    """
    if device.type == "cpu":  # 128 × 151,936 in fp32 are 78 MB
        return 128 if dtype == torch.float32 else 256
    size = 4 if dtype == torch.float32 else 4 + dtype.itemsize
    return max(64, GPU_BYTES // (size * vocabulary) // 64 * 64)  # whole tiles of a matrix product


class _Head:
    """The products of the output head and its gradients, chunk by chunk.

    Products are taken in autocast's dtype, or without autocast in that of the hidden states. The
    gradient of the head is summed in fp32: in 16 bits, a sum over many labels soon stops taking in
    what is added to it. fp16 ends at 65504, so there the factors of a product are scaled by powers
    of two, which is undone in fp32: hidden states to at most 1, and the gradients of logits so that
    the rows of a chunk add up to at most 2¹⁵.
    """

    def __init__(self, hidden_states: Tensor, weight: Tensor) -> None:
        device = hidden_states.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else hidden_states.dtype
        size = min(chunk_rows(len(weight), dtype, device), len(hidden_states))
        self.rows_scale, self.gradient_scale = torch.ones((), device=device), 1.0
        if dtype == torch.float16 and size:
            largest = hidden_states.abs().amax().float()
            self.rows_scale = torch.exp2(-largest.log2().ceil().clamp(0, 100))
            self.gradient_scale = 2.0 ** min(8, 15 - math.ceil(math.log2(size)))
            hidden_states = hidden_states * self.rows_scale
        self.rows, self.matrix = hidden_states.to(dtype), weight.to(dtype)
        starts = range(0, len(self.rows), size or 1)
        self.chunks = [slice(start, start + size) for start in starts]
        # All chunks share the buffers: allocating this much memory anew costs more than the
        # arithmetic on it.
        self.all_logits = torch.empty(size, len(weight), device=device)
        self.all_products = self.all_logits if dtype == torch.float32 else self.all_logits.to(dtype)

    def logits(self, chunk: slice) -> Tensor:
        """(rows of the chunk, V) in fp32, in a buffer that the next chunk overwrites."""
        rows = self.rows[chunk]
        logits, products = self.all_logits[: len(rows)], self.all_products[: len(rows)]
        logits.copy_(torch.mm(rows, self.matrix.T, out=products))
        return logits.div_(self.rows_scale) if rows.dtype == torch.float16 else logits

    def make_gradients(self, of_rows: bool, of_matrix: bool) -> None:
        """Make room for the gradients that `add_gradients` is to compute."""
        self.grad_rows = torch.empty_like(self.rows) if of_rows else None
        self.grad_matrix = torch.zeros_like(self.matrix, dtype=torch.float32) if of_matrix else None
        if of_matrix and self.matrix.dtype != torch.float32:
            numbers = CPU_SLICE if self.matrix.device.type == "cpu" else GPU_SLICE
            self.product = torch.empty_like(self.matrix[: max(1, numbers // self.matrix.shape[1])])

    def add_gradients(self, chunk: slice, gradient: Tensor) -> None:
        """Those that come from the gradient of a chunk's logits, (rows of the chunk, V) in fp32.

        No number of `gradient` exceeds 1; they are overwritten.
        """
        rows = self.rows[chunk]
        if self.gradient_scale != 1:
            gradient.mul_(self.gradient_scale)
        gradient = self.all_products[: len(rows)].copy_(gradient)
        if self.grad_rows is not None:
            torch.mm(gradient, self.matrix, out=self.grad_rows[chunk])
        if self.grad_matrix is None:
            return
        if rows.dtype == torch.float32:
            self.grad_matrix.addmm_(gradient.T, rows)
            return
        step = len(self.product)  # of the head's rows
        for sums, columns in zip(self.grad_matrix.split(step), gradient.split(step, dim=1)):
            sums += torch.mm(columns.T, rows, out=self.product[: len(sums)])


def _unscaled(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """`gradient` times `factor` in fp32, in place where it is fp32: it is as large as the head."""
    return None if gradient is None else gradient.float().mul_(factor).to(dtype)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and both gradients, chunk by chunk in the forward pass, where the logits exist.

    Wijmans et al. 2024; Hsu et al. 2024. The backward pass only scales the gradients.
    """

    @staticmethod
    def forward(ctx, hidden_states: Tensor, weight: Tensor, targets: Tensor, train: bool) -> Tensor:
        head = _Head(hidden_states, weight)
        of_rows, of_matrix = (train and needed for needed in ctx.needs_input_grad[:2])
        head.make_gradients(of_rows, of_matrix)
        loss = torch.zeros((), dtype=torch.float32, device=hidden_states.device)
        for chunk in head.chunks:
            logits, target = head.logits(chunk), targets[chunk, None]
            torch.log_softmax(logits, dim=-1, out=logits)
            loss -= logits.gather(1, target).sum()
            if of_rows or of_matrix:  # d loss / d logits = softmax − one-hot
                logits.exp_().scatter_add_(1, target, logits.new_full(target.shape, -1.0))
                head.add_gradients(chunk, logits)
        ctx.save_for_backward(head.grad_rows, head.grad_matrix, head.rows_scale)
        ctx.gradient_scale, ctx.dtypes = head.gradient_scale, (hidden_states.dtype, weight.dtype)
        return loss

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        grad_rows, grad_matrix, rows_scale = ctx.saved_tensors
        factor = grad_loss / ctx.gradient_scale
        grad_rows = _unscaled(grad_rows, factor, ctx.dtypes[0])
        return grad_rows, _unscaled(grad_matrix, factor / rows_scale, ctx.dtypes[1]), None, None


def chunked_cross_entropy(hidden_states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The summed cross entropy of `hidden_states @ weight.T` against `targets`, a scalar in fp32.

    `hidden_states` (M, C), `weight` (V, C), `targets` (M,) token ids. Products are taken in
    autocast's dtype, or without autocast in that of `hidden_states`; the softmax and the sum of the
    head's gradient in fp32. Only one backward pass is possible: it reuses the memory of the
    gradients.
    """
    return _ChunkedCrossEntropy.apply(hidden_states, weight, targets, torch.is_grad_enabled())


class _TokenLogProbabilities(torch.autograd.Function):
    """Keeps no logits: the backward pass computes them again.

    Unlike with the cross entropy, the factor of each token's gradient is not known before.
    """

    @staticmethod
    def forward(ctx, hidden_states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_states, weight, targets)
        head = _Head(hidden_states, weight)
        log_probabilities = torch.empty(len(targets), device=hidden_states.device)
        for chunk in head.chunks:
            logits = head.logits(chunk)
            chosen = logits.gather(1, targets[chunk, None])[:, 0]
            log_probabilities[chunk] = chosen - logits.logsumexp(dim=-1)
        return log_probabilities

    @staticmethod
    def backward(ctx, grad: Tensor):
        hidden_states, weight, targets = ctx.saved_tensors
        head = _Head(hidden_states, weight)
        head.make_gradients(*ctx.needs_input_grad[:2])
        largest = torch.ones_like(head.rows_scale)
        if head.gradient_scale != 1:  # to at most 1, as `add_gradients` has it
            largest = grad.abs().amax().clamp(min=torch.finfo(grad.dtype).tiny)
        for chunk in head.chunks:
            factor, target = (grad[chunk] / largest)[:, None], targets[chunk, None]
            # d log p / d logits = one-hot − softmax
            logits = head.logits(chunk)
            torch.softmax(logits, dim=-1, out=logits)
            logits.mul_(-factor).scatter_add_(1, target, factor)
            head.add_gradients(chunk, logits)
        factor = largest / head.gradient_scale
        grad_rows = _unscaled(head.grad_rows, factor, hidden_states.dtype)
        return grad_rows, _unscaled(head.grad_matrix, factor / head.rows_scale, weight.dtype), None


def token_log_probabilities(hidden_states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """log softmax(hidden_states @ weight.T) at each of `targets`: (M,) in fp32.

    Arguments and dtypes as in `chunked_cross_entropy`, whose result is the negative sum of this.
    The backward pass multiplies with the output head once more, so that no logits are kept between
    the passes.
    """
    return _TokenLogProbabilities.apply(hidden_states, weight, targets)
