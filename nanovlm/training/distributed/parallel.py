"""Several processes train one model, as torchrun starts them; a process started by itself is a world of one.

    torchrun --nproc_per_node 4 train_stage1.py …                  ddp: every process holds the model
    torchrun --nproc_per_node 4 train_stage1.py --parallel fsdp …  every process holds a share of it (`fsdp.py`)

Each process takes its own records through the model. The sum of their gradients, over all labelled tokens of the step,
is the gradient of one large batch, so the number of processes does not show in the loss. What the processes have to
agree on, such as that number of tokens, they tell each other from CPU to CPU, so that no accelerator is waited for.
"""

import json
import os
import random
from collections import deque
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanovlm.data.batches import LoadedBatch
from nanovlm.errors import NanoVLMError
from nanovlm.inputs.batch import Batch
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.training.distributed.fsdp import Sharded, broadcast
from nanovlm.training.distributed.shares import total, wait
from nanovlm.training.precision import Precision
from nanovlm.training.settings import Settings
from nanovlm.utils.console import first_line
from nanovlm.utils.processes import is_main, processes

BUCKET = (
    25 * 2**20 // 4
)  # numbers sent at once, 25 MB of fp32: large enough for the network, small beside the model
SILENCE = timedelta(
    minutes=30
)  # after which a process that does not answer counts as lost; rank 0 may be writing


class Parallel:
    """The processes of a run, of which this is number `rank` of `world`. In a world of one, methods leave all as it is."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        """torchrun's environment says who else there is. On CUDA each process of a machine has a GPU of its own."""
        self.rank, self.world = processes()
        self.settings, self.device, self.is_main = settings, device, is_main()
        self._sharded: Sharded | None = None
        if self.world == 1:
            return
        if settings.parallel == "fsdp" and (
            settings.optimizer != "adamw" or settings.stochastic_rounding
        ):
            raise NanoVLMError(
                "--parallel fsdp shares out what plain AdamW keeps; take --optimizer adamw without "
                "--stochastic-rounding, or --parallel ddp"
            )
        if settings.stochastic_rounding and settings.lora_dropout:
            raise NanoVLMError(
                "--stochastic-rounding needs the same random numbers in every process and --lora-dropout other "
                "ones; leave one of them out"
            )
        if device.type == "cuda":
            number, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
            if number >= count:
                raise NanoVLMError(
                    f"process {number} of this machine has no GPU, there are {count}; lower --nproc_per_node"
                )
            self.device = torch.device("cuda", number)
            torch.cuda.set_device(self.device)
        elif device.type != "cpu":
            raise NanoVLMError(
                f"several processes cannot share {device.type}; start one without torchrun, or take --device cpu"
            )
        if dist.is_initialized():
            return
        try:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=SILENCE
            )
        except (RuntimeError, ValueError) as error:
            raise NanoVLMError(
                f"the processes do not find each other ({first_line(error)}); "
                "start them with torchrun"
            ) from None

    @property
    def launcher(self) -> str:
        """What a command line of this run begins with."""
        here = os.environ.get("LOCAL_WORLD_SIZE", self.world)
        return "python" if self.world == 1 else f"torchrun --nproc_per_node {here}"

    def end(self) -> None:
        """When all have come here, no more is said between them. Before, none exits: torchrun would end the others too."""
        if self.world > 1:
            wait()
            dist.destroy_process_group()

    def seed(self, step: int) -> None:
        """Give the step random numbers of its own, so that a resumed run draws the same: every process others (dropout),
        or all the same (stochastic rounding, where each has to make the same weights)."""
        rank = 0 if self.settings.stochastic_rounding else self.rank
        torch.manual_seed(random.Random(f"{self.settings.seed}/{step}/{rank}").getrandbits(63))

    # ---- what all have to know

    def sum(self, tensor: Tensor) -> Tensor:
        """A tensor of the device, summed over the processes in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, number: int) -> int:
        """The largest that any process has."""
        return max(self.each(number))

    def each(self, number: int) -> list[int]:
        """The number of each process, by rank."""
        return total(*(number if rank == self.rank else 0 for rank in range(self.world)))

    def all_lines(self, lines: list[str]) -> list[str]:
        """The lines of all processes, in the order of ranks."""
        if self.world == 1:
            return lines
        text = json.dumps(lines).encode()
        ends = torch.tensor(self.each(len(text))).cumsum(0).tolist()
        shared = torch.zeros(ends[-1], dtype=torch.uint8)
        shared[ends[self.rank] - len(text) : ends[self.rank]] = torch.tensor(
            list(text), dtype=torch.uint8
        )
        dist.all_reduce(shared)
        return [
            line
            for start, end in zip([0, *ends], ends)
            for line in json.loads(bytes(shared[start:end].tolist()))
        ]

    def check_same(self, what: str, number: int) -> None:
        """Refuse a number that is not the same in all processes, since they would take different steps."""
        if len(set(numbers := self.each(number))) > 1:
            raise NanoVLMError(
                f"the processes have {', '.join(map(str, numbers))} {what}, by rank; "
                "give all machines the same files and flags"
            )

    # ---- the model and its gradients

    def place(self, model: VisionLanguageModel, precision: Precision) -> None:
        """Bring the model to its device and number format, as rank 0 has it."""
        if (
            self.world > 1
            and self.settings.stochastic_rounding
            and model.config.language_model.dropout
        ):
            raise NanoVLMError(
                "--stochastic-rounding needs the same random numbers in every process and the decoder's dropout "
                "other ones; leave it out"
            )
        if self.settings.parallel == "fsdp" and self.world > 1:
            self._sharded = Sharded(model, precision, self.world, self.settings.cache_features)
            return
        precision.place(model)
        if self.world > 1:
            broadcast(model)

    def passes(self, loaded: Sequence[LoadedBatch]) -> Iterator[Batch]:
        """The batches that a step takes through the model; with fsdp as many in all processes, and the last sends gradients."""
        self._saw_images = any(item.images for item in loaded)
        for number, item in enumerate(loaded, start=1):
            if self._sharded is not None:
                self._sharded.model.set_requires_gradient_sync(number == len(loaded))
            if (batch := self.complete(item.batch)) is not None:
                yield batch

    def complete(self, batch: Batch | None) -> Batch | None:
        """With fsdp, a batch that runs every layer: all processes have to."""
        return batch if self._sharded is None else self._sharded.complete(batch)

    def reduce_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum the gradients over the processes, once a step: bucket by bucket, one under way while the next is packed.

        A parameter without a gradient in some processes (no image came by) counts as zero there; without one in any it
        keeps none. fsdp has summed its shares in the backward pass.
        """
        if self.world == 1:
            return
        if self._sharded is not None:
            return self._sharded.finish_gradients(self._saw_images)
        present = total(*(int(parameter.grad is not None) for parameter in parameters))
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
        clip = nn.utils.clip_grad_norm_ if self._sharded is None else self._sharded.clip
        return clip(parameters, largest)

    def reshard(self) -> None:
        """With fsdp, let go of the layers that a pass without a backward one has left gathered."""
        if self._sharded is not None:
            self._sharded.model.reshard()

    def whole(self, model: VisionLanguageModel) -> VisionLanguageModel | None:
        """The whole model in rank 0, with fsdp a new one on the CPU; None in the others. All have to call it."""
        if self._sharded is not None:
            return self._sharded.whole()
        return model if self.is_main else None


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
