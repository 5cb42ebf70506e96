"""A model of which each process holds a share of every tensor, by PyTorch's `fully_shard`.

FSDP (Zhao et al. 2023): the weights of a block are gathered when it runs and freed afterwards, so a
process holds its share of weights, gradients and optimizer state, and one whole block. A pass
exchanges tensors between all processes, so all of them have to take the same passes.
"""

import copy
import dataclasses
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanovlm.inputs.batch import Batch
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.training.distributed.shares import gather, is_shared, local, total
from nanovlm.training.precision import Precision
from nanovlm.utils.processes import is_main


class Sharded:
    """`model`, brought to its device and dtype block by block, and shared among the processes."""

    def __init__(
        self, model: VisionLanguageModel, precision: Precision, world: int, features: bool
    ) -> None:
        """With `features`, batches bring patch vectors and the vision encoder does not run."""
        # Imported here, since they take a moment.
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        self.model, self._whole = model, _without_weights(model)
        self._blank = _blank_image(model, precision.dtype, features)
        blocks = model.vision_encoder.blocks
        running = 0 if features else model.config.vision_depth
        # fully_shard expects that what it shards runs.
        idle = [model.vision_encoder] if features else blocks[running:]
        ignored = {parameter for module in idle for parameter in module.parameters()}
        policy = MixedPrecisionPolicy(
            param_dtype=None if precision.dtype == torch.float32 else precision.dtype,
            reduce_dtype=torch.float32,
        )
        mesh = init_device_mesh(precision.device.type, (world,))
        for module in (*model.language_model.blocks, *blocks[:running], model):
            precision.place(module)
            broadcast(module)
            unit = fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=ignored)
            unit.set_gradient_divide_factor(1.0)  # the sum; fully_shard would take the mean
            unit.set_force_sum_reduction_for_comms(True)  # plain sums: gloo knows no other
        self._unit = unit

    def sync_gradients(self, wanted: bool) -> None:
        """Whether the next backward pass exchanges gradients between the processes."""
        self._unit.set_requires_gradient_sync(wanted)

    def reshard(self) -> None:
        """Free the layers that a forward pass without a backward one left gathered."""
        self._unit.reshard()

    def complete(self, batch: Batch | None) -> Batch:
        """A batch that runs the vision encoder and the projector: the one given if it has an image.

        Otherwise a row with a blank image is added to it, or to an empty batch if it is None. The
        row has no label, so it changes neither loss nor gradients.
        """
        if batch is not None and len(batch.image_positions):
            return batch
        image_length, none = self.model.image_length, torch.zeros(0, dtype=torch.int64)
        if batch is None:
            no_rows = none.view(0, image_length)
            batch = Batch(no_rows, no_rows, none, none, none)
        mask = batch.attention_mask
        if mask is None:
            mask = torch.ones_like(batch.input_ids)
        rows, length = batch.input_ids.shape
        longer = max(length, image_length)
        input_ids, attention_mask = torch.zeros(2, rows + 1, longer, dtype=torch.int64)
        input_ids[:rows, :length], attention_mask[:rows, :length] = batch.input_ids, mask
        input_ids[rows, :image_length] = self.model.chat.image_token_id
        attention_mask[rows, :image_length] = 1
        row, column = batch.target_positions // length, batch.target_positions % length
        return dataclasses.replace(
            batch,
            input_ids=input_ids,
            attention_mask=attention_mask,
            image_positions=rows * longer + torch.arange(image_length),
            target_positions=row * longer + column,
            **self._blank,
        )

    def finish_gradients(self, saw_images: bool) -> None:
        """Drop the gradients of vision encoder and projector if no process had a real image.

        Those of the blank images are zero, and with a gradient of zero AdamW would still move the
        weights by their momentum.
        """
        if not total(int(saw_images))[0]:
            for module in (self.model.vision_encoder, self.model.projector):
                for parameter in module.parameters():
                    parameter.grad = None

    def clip(self, parameters: Sequence[nn.Parameter], largest: float) -> Tensor:
        """`clip_grad_norm_` over all shares."""
        present = [parameter.grad for parameter in parameters if parameter.grad is not None]
        gradients = [local(gradient) for gradient in present]
        norm = nn.utils.get_total_norm(gradients).float().square()
        dist.all_reduce(norm)
        if gradients:
            factor = (largest / (norm.sqrt() + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, factor)  # pyright: ignore[reportPrivateImportUsage]
        return norm.sqrt()

    def whole(self) -> VisionLanguageModel | None:
        """The whole model as a plain one on the CPU of rank 0; None in the others."""
        weights = {name: gather(tensor) for name, tensor in self.model.state_dict().items()}
        if not is_main():
            return None
        self._whole.load_state_dict(weights, assign=True)
        for module in self._whole.modules():
            # Buffers are of quantised matrices, which every process holds whole.
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.cpu())
        return self._whole


def broadcast(module: nn.Module) -> None:
    """Give every process the tensors of rank 0; those that are sharded already stay."""
    for tensor in (*module.parameters(), *module.buffers()):
        if not is_shared(tensor):
            dist.broadcast(tensor.data, src=0)


def _blank_image(
    model: VisionLanguageModel, dtype: torch.dtype, features: bool
) -> dict[str, Tensor]:
    """A black image as a batch holds it: pixels, (1, 3, H, W), or features, (1, P, C_v)."""
    if features:
        return {"patches": torch.zeros(1, *model.config.feature_shape, dtype=dtype)}
    image = model.config.image
    return {"pixels": torch.zeros(1, 3, image.height, image.width)}


def _without_weights(model: VisionLanguageModel) -> VisionLanguageModel:
    """The same model with parameters that take no memory, to be given their values later."""
    kept = [*model.buffers(), model.tokenizer, model.chat]
    empty = {
        id(parameter): nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, {id(thing): thing for thing in kept} | empty)
