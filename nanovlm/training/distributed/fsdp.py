"""A model of which each process holds a share of every tensor (Zhao et al. 2023), by PyTorch's `fully_shard`.

A block's weights are gathered when it runs and let go of after it, so a process holds its share of weights, gradients
and optimizer state, and one block. Every pass is a conversation of all processes, so all take the same passes.
"""

import copy
import dataclasses
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanovlm.inputs.batch import Batch
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.training.distributed.shares import gather, local, total
from nanovlm.training.precision import Precision
from nanovlm.utils.processes import is_main


class Sharded:
    """`model`, brought to its device and number format block by block, a share of each to every process."""

    def __init__(
        self, model: VisionLanguageModel, precision: Precision, world: int, features: bool
    ) -> None:
        """With `features`, batches bring patch vectors and the eyes do not run."""
        from torch.distributed.device_mesh import (
            init_device_mesh,
        )  # imported where they are needed: they take a moment
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        self.model, self._whole = model, _without_weights(model)
        image, eyes = model.config.image, model.config.vision_encoder
        layer = model.config.vision_layer
        shape = (1, eyes.num_features(image.height, image.width, layer), eyes.feature_size(layer))
        self._blank = (
            {"patches": torch.zeros(shape, dtype=precision.dtype)}
            if features
            else {"pixels": torch.zeros(1, 3, image.height, image.width)}
        )
        blocks, running = model.vision_encoder.blocks, 0 if features else eyes.blocks_below(layer)
        idle = (
            [model.vision_encoder] if features else blocks[running:]
        )  # fully_shard expects what it shards to run
        ignored = {parameter for module in idle for parameter in module.parameters()}
        policy = MixedPrecisionPolicy(
            param_dtype=None if precision.dtype == torch.float32 else precision.dtype,
            reduce_dtype=torch.float32,
        )
        mesh = init_device_mesh(precision.device.type, (world,))
        for unit in (*model.language_model.blocks, *blocks[:running], model):
            precision.place(unit)
            broadcast(unit)
            fully_shard(unit, mesh=mesh, mp_policy=policy, ignored_params=ignored)
            unit.set_gradient_divide_factor(1.0)  # the sum, where fully_shard would take the mean
            unit.set_force_sum_reduction_for_comms(True)  # plain sums: gloo knows no other

    def complete(self, batch: Batch | None) -> Batch:
        """The batch (None: an empty one) with a row that shows a blank image, unless it shows one already, so that eyes and
        projector run. The row has no label, and so no part in loss and gradients."""
        if batch is not None and len(batch.image_positions):
            return batch
        image_length, none = self.model.image_length, torch.zeros(0, dtype=torch.int64)
        if batch is None:
            batch = Batch(none.view(0, image_length), none.view(0, image_length), none, none, none)
        rows, length = batch.input_ids.shape
        longer = max(length, image_length)
        input_ids, attention_mask = torch.zeros(2, rows + 1, longer, dtype=torch.int64)
        input_ids[:rows, :length], attention_mask[:rows, :length] = (
            batch.input_ids,
            batch.attention_mask,
        )
        input_ids[rows, :image_length], attention_mask[rows, :image_length] = (
            self.model.chat.image_token_id,
            1,
        )
        return dataclasses.replace(
            batch,
            input_ids=input_ids,
            attention_mask=attention_mask,
            image_positions=rows * longer + torch.arange(image_length),
            target_positions=batch.target_positions // length * longer
            + batch.target_positions % length,
            **self._blank,
        )

    def finish_gradients(self, saw_images: bool) -> None:
        """Where no process saw an image, take back the zeros of the blank ones, so that no momentum moves the eyes."""
        if not total(int(saw_images))[0]:
            for parameter in (
                *self.model.vision_encoder.parameters(),
                *self.model.projector.parameters(),
            ):
                parameter.grad = None

    def clip(self, parameters: Sequence[nn.Parameter], largest: float) -> Tensor:
        """`clip_grad_norm_` over all shares."""
        gradients = [
            local(parameter.grad) for parameter in parameters if parameter.grad is not None
        ]
        norm = nn.utils.get_total_norm(gradients).float().square()
        dist.all_reduce(norm)
        if gradients:
            torch._foreach_mul_(gradients, (largest / (norm.sqrt() + 1e-6)).clamp(max=1.0))
        return norm.sqrt()

    def whole(self) -> VisionLanguageModel | None:
        """All of the model as a plain one on the CPU of rank 0; None in the others."""
        weights = {name: gather(tensor) for name, tensor in self.model.state_dict().items()}
        if not is_main():
            return None
        self._whole.load_state_dict(weights, assign=True)
        for module in self._whole.modules():
            for name, buffer in module.named_buffers(
                recurse=False
            ):  # of quantised matrices, which every process holds whole
                setattr(module, name, buffer.cpu())
        return self._whole


def broadcast(module: nn.Module) -> None:
    """Give every process the tensors of rank 0; those that are shared already stay."""
    for tensor in (*module.parameters(), *module.buffers()):
        if not hasattr(tensor, "to_local"):
            dist.broadcast(tensor.data, src=0)


def _without_weights(model: VisionLanguageModel) -> VisionLanguageModel:
    """The same model with parameters that take no memory, to be given their values later."""
    kept = [*model.buffers(), model.tokenizer, model.chat]
    empty = {
        id(parameter): nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, {id(thing): thing for thing in kept} | empty)
