"""Several processes train one model, as torchrun starts them; a process started by itself is a world of one.

    torchrun --nproc_per_node 4 train_stage1.py …                  ddp: every process holds the model
    torchrun --nproc_per_node 4 train_stage1.py --parallel fsdp …  every process holds its share of each tensor

Each process takes its own records through the model. The sum of their gradients, over all labelled tokens of the step,
is the gradient of one large batch, so the number of processes does not show in the loss. What the processes have to
agree on, such as that number of tokens, they tell each other from CPU to CPU, so that no accelerator is waited for.
"""

import copy
import dataclasses
import json
import os
import random
from collections import deque
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanovlm.data.dataset import Loaded
from nanovlm.errors import NanoVLMError, first_line, is_main, processes
from nanovlm.training.settings import Settings
from nanovlm.vlm import Batch, VisionLanguageModel

if TYPE_CHECKING:  # which itself asks here for shares of gradients
    from nanovlm.training.precision import Precision

BUCKET = 25 * 2**20 // 4  # numbers sent at once, 25 MB of fp32: large enough for the network, small beside the model
SILENCE = timedelta(minutes=10)  # after which a process that does not answer counts as lost


class Parallel:
    """The processes of a run, of which this is number `rank` of `world`. In a world of one, every method leaves all as it is."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        """torchrun's environment says who else there is. On CUDA each process of a machine has a GPU of its own."""
        self.rank, self.world = processes()
        self.sharded = settings.parallel == "fsdp" and self.world > 1
        self.device, self.is_main, self._features = device, is_main(), settings.cache_features
        if self.world == 1:
            return
        lean = settings.stochastic_rounding or settings.optimizer == "adamw8bit"
        if self.sharded and (lean or settings.quantize):
            raise NanoVLMError("--parallel fsdp goes with --optimizer adamw and without --stochastic-rounding and --quantize; "
                               "leave them out, or take --parallel ddp")
        if settings.stochastic_rounding and settings.lora_dropout:
            raise NanoVLMError("--stochastic-rounding needs the same random numbers in every process and --lora-dropout other "
                               "ones; leave one of them out")
        self._alike = settings.stochastic_rounding
        if device.type == "cuda":
            local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
            if local >= count:
                raise NanoVLMError(f"process {local} of this machine has no GPU, there are {count}; lower --nproc_per_node")
            self.device = torch.device("cuda", local)
            torch.cuda.set_device(self.device)
        elif device.type != "cpu":
            raise NanoVLMError(f"several processes cannot share {device.type}; start one without torchrun, or take --device cpu")
        if dist.is_initialized():
            return
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=SILENCE)
        except (RuntimeError, ValueError) as error:
            raise NanoVLMError(f"the processes do not find each other ({first_line(error)}); start them with torchrun") from None

    @property
    def answers(self) -> bool:
        """Whether this process can ask the model while it trains: with fsdp, none holds all of it."""
        return self.is_main and not self.sharded

    @property
    def launcher(self) -> str:
        """What a command line of this run begins with."""
        return "python" if self.world == 1 else f"torchrun --nproc_per_node {os.environ.get('LOCAL_WORLD_SIZE', self.world)}"

    def end(self) -> None:
        """No more is said between processes."""
        if self.world > 1:
            dist.destroy_process_group()

    def seed(self, seed: int, step: int) -> None:
        """Give every process random numbers of its own (dropout), or all the same (stochastic rounding, where each has to
        make the same weights), anew from `step` on: any number of them may resume."""
        if self.world > 1:
            torch.manual_seed(random.Random(f"{seed}/{step}/{0 if self._alike else self.rank}").getrandbits(63))

    # ---- what all have to know; numbers and words on the CPU

    def total(self, *numbers: float) -> list:
        """Each number summed over the processes; whole numbers stay whole."""
        if self.world == 1:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(sums)
        return [type(number)(value) for number, value in zip(numbers, sums.tolist())]

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if self.world == 1:
            return number
        numbers = torch.tensor([number])
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return int(numbers)

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process."""
        return self.largest(int(flag)) > 0

    def worst(self, flag: Tensor) -> Tensor:
        """The largest of the processes' values, on the device."""
        if self.world > 1:
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        return flag

    def all_lines(self, lines: list[str]) -> list[str]:
        """The lines of all processes, in the order of ranks."""
        if self.world == 1:
            return lines
        text = json.dumps(lines).encode()
        ends = torch.tensor(self.total(*(len(text) if rank == self.rank else 0 for rank in range(self.world)))).cumsum(0).tolist()
        shared = torch.zeros(ends[-1], dtype=torch.uint8)
        shared[ends[self.rank] - len(text):ends[self.rank]] = torch.tensor(list(text), dtype=torch.uint8)
        dist.all_reduce(shared)
        return [line for start, end in zip([0, *ends], ends) for line in json.loads(bytes(shared[start:end].tolist()))]

    def check_same(self, what: str, number: int) -> None:
        """Refuse a number that is not the same in all processes, since they would take different steps."""
        numbers = self.total(*(number if rank == self.rank else 0 for rank in range(self.world)))
        if len(set(numbers)) > 1:
            raise NanoVLMError(f"the processes have {', '.join(map(str, numbers))} {what}, by rank; "
                               "give all machines the same files and flags")

    # ---- the model and its gradients

    def place(self, model: VisionLanguageModel, precision: "Precision") -> None:
        """Bring the model to its device and number format, as rank 0 has it; with fsdp, block by block, a share of each."""
        if not self.sharded:
            precision.place(model)
            if self.world > 1:
                _broadcast(model)
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        self._model, self._whole = model, _without_weights(model)
        image, eyes = model.config.image, model.config.vision
        patches = (image.height // eyes.patch_size) * (image.width // eyes.patch_size)
        self._blank = ({"patches": torch.zeros(1, patches, eyes.hidden_size, dtype=precision.dtype)} if self._features else
                       {"pixels": torch.zeros(1, 3, image.height, image.width)})
        mesh = init_device_mesh(self.device.type, (self.world,))
        dtype = None if precision.dtype == torch.float32 else precision.dtype
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        blocks, layer = model.vision.blocks, model.config.vision_layer
        running = 0 if self._features else len(blocks) if layer == -1 else layer % (len(blocks) + 1)
        idle = [model.vision] if self._features else blocks[running:]  # fully_shard expects what it shards to run
        ignored = {parameter for module in idle for parameter in module.parameters()}
        for unit in (*model.decoder.blocks, *blocks[:running], model):
            precision.place(unit)
            _broadcast(unit)
            fully_shard(unit, mesh=mesh, mp_policy=policy, ignored_params=ignored)
            unit.set_gradient_divide_factor(1.0)  # the sum, where fully_shard would take the mean
            unit.set_force_sum_reduction_for_comms(True)  # plain sums: gloo knows no other

    def passes(self, loaded: Sequence[Loaded]) -> Iterator[Batch]:
        """The batches that a step takes through the model.

        With fsdp, every pass gathers every layer from all processes. So all take the same number of passes, each with
        an image at least, and only the last one sends gradients.
        """
        self._saw_images = any(item.batch is not None and len(item.batch.image_positions) for item in loaded)
        for number, item in enumerate(loaded, start=1):
            if self.sharded:
                self._model.set_requires_gradient_sync(number == len(loaded))
                yield self.complete(item.batch)
            elif item.batch is not None:
                yield item.batch

    def complete(self, batch: Batch | None) -> Batch | None:
        """With fsdp, the batch (None: an empty one) with a row that shows a blank image, unless it shows one already. The
        row has no label, and so no part in loss and gradients."""
        if not self.sharded or batch is not None and len(batch.image_positions):
            return batch
        image_length, none = self._model.image_length, torch.zeros(0, dtype=torch.int64)
        if batch is None:
            batch = Batch(none.view(0, image_length), none.view(0, image_length), none, none, none)
        rows, length = batch.input_ids.shape
        longer = max(length, image_length)
        input_ids, attention_mask = torch.zeros(2, rows + 1, longer, dtype=torch.int64)
        input_ids[:rows, :length], attention_mask[:rows, :length] = batch.input_ids, batch.attention_mask
        input_ids[rows, :image_length], attention_mask[rows, :image_length] = self._model.chat.image_token_id, 1
        return dataclasses.replace(
            batch, input_ids=input_ids, attention_mask=attention_mask,
            image_positions=rows * longer + torch.arange(image_length),
            target_positions=batch.target_positions // length * longer + batch.target_positions % length,
            **self._blank)

    def reduce_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum the gradients over the processes, once a step: bucket by bucket, one under way while the next is packed.

        A parameter without a gradient in some processes (no image came by) counts as zero there; without one in any it
        keeps none, so that no momentum moves it. fsdp has summed its shares in the backward pass, where the blank images
        have left zeros.
        """
        if self.sharded and not self.any(self._saw_images):
            for parameter in (*self._model.vision.parameters(), *self._model.projector.parameters()):
                parameter.grad = None
        if self.sharded or self.world == 1:
            return
        present = self.total(*(int(parameter.grad is not None) for parameter in parameters))
        gradients = []
        for parameter, count in zip(parameters, present):
            if count and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients += [parameter.grad] if count else []
        under_way: deque[tuple[list[Tensor], Tensor, dist.Work]] = deque()
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.float().flatten() for gradient in bucket])
            under_way.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
            if len(under_way) > 1:
                _unpack(*under_way.popleft())
        for sent in under_way:
            _unpack(*sent)

    def clip(self, parameters: Sequence[nn.Parameter], largest: float) -> Tensor:
        """Scale the gradients down to the norm `largest`; returns the norm over all processes before."""
        if not self.sharded:
            return nn.utils.clip_grad_norm_(parameters, largest)
        gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients).float().square()
        dist.all_reduce(norm)
        if gradients:
            torch._foreach_mul_(gradients, (largest / (norm.sqrt() + 1e-6)).clamp(max=1.0))
        return norm.sqrt()

    def reshard(self) -> None:
        """With fsdp, let go of the layers that a pass without a backward one has left gathered."""
        if self.sharded:
            self._model.reshard()

    def whole(self, model: VisionLanguageModel) -> VisionLanguageModel | None:
        """The whole model in rank 0, with fsdp a new one on the CPU; None in the others."""
        if self.sharded:
            weights = {name: gather(tensor) for name, tensor in model.state_dict().items()}
            if self.is_main:
                self._whole.load_state_dict(weights, assign=True)
            model = self._whole
        return model if self.is_main else None


def wait_for_all() -> None:
    """Go on once every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def local(tensor: Tensor) -> Tensor:
    """This process's share of a tensor; of one that is not shared, all of it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def gather(tensor: Tensor) -> Tensor | None:
    """The whole of a tensor: one that is not shared itself; a shared one on the CPU of rank 0, None in the others. All
    processes have to call it."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    full = tensor.detach().full_tensor()
    return full.cpu() if is_main() else None


def scatter(full: Tensor, like: Tensor) -> Tensor:
    """A copy of `full` as `like` is kept: on its device and, where that one is shared, only this process's share."""
    if full.shape == like.shape and hasattr(like, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor  # imported where it is needed: it takes a moment
        return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return full.clone().to(like.device)


def _broadcast(module: nn.Module) -> None:
    for tensor in (*module.parameters(), *module.buffers()):
        if not hasattr(tensor, "to_local"):
            dist.broadcast(tensor.data, src=0)


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The gradients in order, up to `BUCKET` numbers together."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and sum(map(torch.numel, bucket)) + gradient.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


def _unpack(bucket: list[Tensor], flat: Tensor, transfer: dist.Work) -> None:
    transfer.wait()
    parts = flat.split([gradient.numel() for gradient in bucket])
    torch._foreach_copy_(bucket, [part.view_as(gradient) for part, gradient in zip(parts, bucket)])


def _without_weights(model: VisionLanguageModel) -> VisionLanguageModel:
    """The same model with parameters that take no memory, to be given their values at the end."""
    kept = [*model.buffers(), model.tokenizer, model.chat]
    memo = {id(thing): thing for thing in kept} | {
        id(parameter): nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad) for parameter in model.parameters()}
    return copy.deepcopy(model, memo)
