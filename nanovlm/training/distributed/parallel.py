"""Several processes train one model, started by torchrun; a single process is a world of one.

    torchrun --nproc_per_node 4 train_stage1.py …                  ddp: each has the model
    torchrun --nproc_per_node 4 train_stage1.py --parallel fsdp …  each has a share (`fsdp.py`)

Each process takes its own records through the model. The sum of their gradients, over all labelled
tokens of the step, is the gradient of one large batch, so the loss does not depend on the number of
processes. Numbers that they have to agree on go from CPU to CPU, so that no accelerator is waited
for.
"""

import json
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
from nanovlm.utils.processes import is_main, processes, processes_here, rank_here

# Gradients sent at once, 25 MB in fp32: large for the network, small beside the model.
BUCKET = 25 * 2**20 // 4
# A process that does not answer for so long counts as lost; rank 0 may be writing meanwhile.
TIMEOUT = timedelta(minutes=30)


def build_parallel(settings: Settings, device: torch.device) -> "Parallel":
    """The processes of a run with these settings; refuses what several of them cannot do."""
    if processes()[1] > 1:
        plain = settings.optimizer == "adamw" and not settings.stochastic_rounding
        if settings.parallel == "fsdp" and not plain:
            raise NanoVLMError(
                "--parallel fsdp shares out what plain AdamW keeps; take --optimizer adamw without "
                "--stochastic-rounding, or --parallel ddp"
            )
        if settings.stochastic_rounding and settings.lora_dropout:
            raise NanoVLMError(
                "--stochastic-rounding needs the same random numbers in every process and "
                "--lora-dropout different ones; leave one of them out"
            )
    sharded = settings.parallel == "fsdp"
    return Parallel(device, sharded, settings.seed, same_seed=settings.stochastic_rounding)


class Parallel:
    """The processes of a run, of which this is number `rank` of `world`.

    In a world of one, its methods leave everything as it is.

    device: the one of this process; on CUDA each process of a machine has a GPU of its own.
    same_seed: whether all processes draw the same random numbers.
    """

    def __init__(
        self, device: torch.device, sharded: bool = False, seed: int = 0, *, same_seed: bool = False
    ) -> None:
        self.rank, self.world = processes()
        self.device, self.is_main = device, is_main()
        self._shards = sharded and self.world > 1
        self._seed, self._same_seed = seed, same_seed
        self._sharded: Sharded | None = None
        self._saw_images = False
        if self.world == 1:
            return
        if device.type == "cuda":
            number, count = rank_here(), torch.cuda.device_count()
            if number >= count:
                raise NanoVLMError(
                    f"process {number} of this machine has no GPU, there are {count}; "
                    "lower --nproc_per_node"
                )
            self.device = torch.device("cuda", number)
            torch.cuda.set_device(self.device)
        elif device.type != "cpu":
            raise NanoVLMError(
                f"several processes cannot share {device.type}; "
                "start one without torchrun, or take --device cpu"
            )
        if not dist.is_initialized():
            _connect("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")

    @property
    def launcher(self) -> str:
        """What a command line of this run begins with."""
        return "python" if self.world == 1 else f"torchrun --nproc_per_node {processes_here()}"

    def end(self) -> None:
        """Wait for all processes and disconnect. If one exited earlier, torchrun would end all."""
        if self.world > 1:
            wait()
            dist.destroy_process_group()

    def seed(self, step: int) -> None:
        """Seed the random numbers of a step, so that a resumed run draws the same ones.

        Processes draw different numbers (dropout), or the same ones where each of them has to round
        to the same weights (stochastic rounding).
        """
        rank = 0 if self._same_seed else self.rank
        torch.manual_seed(random.Random(f"{self._seed}/{step}/{rank}").getrandbits(63))

    # ---- numbers and lines of all processes

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor on the device over the processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, number: int) -> int:
        """The largest number of any process."""
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
        shared, own_end = torch.zeros(ends[-1], dtype=torch.uint8), ends[self.rank]
        shared[own_end - len(text) : own_end] = torch.tensor(list(text), dtype=torch.uint8)
        dist.all_reduce(shared)
        texts = (bytes(shared[start:end].tolist()) for start, end in zip([0, *ends], ends))
        return [line for text in texts for line in json.loads(text)]

    def check_same(self, what: str, number: int) -> None:
        """Refuse a number that differs between processes, since their steps would differ, too."""
        if len(set(numbers := self.each(number))) > 1:
            raise NanoVLMError(
                f"the processes have {', '.join(map(str, numbers))} {what}, by rank; "
                "give all machines the same files and flags"
            )

    # ---- the model and its gradients

    def place(self, model: VisionLanguageModel, precision: Precision, features: bool) -> None:
        """Bring the model to its device and dtype, with the weights of rank 0.

        features: whether batches bring the vision encoder's features, so that it does not run.
        """
        if self.world > 1 and self._same_seed and model.config.language_model.dropout:
            raise NanoVLMError(
                "--stochastic-rounding needs the same random numbers in every process and the "
                "language model's dropout different ones; leave it out"
            )
        if self._shards:
            self._sharded = Sharded(model, precision, self.world, features)
            return
        precision.place(model)
        if self.world > 1:
            broadcast(model)

    def micro_batches(self, loaded: Sequence[LoadedBatch]) -> Iterator[Batch]:
        """The batches of a step that go through the model, one by one.

        With fsdp all processes take the same number of them, and gradients are exchanged in the
        last one.
        """
        self._saw_images = any(item.images for item in loaded)
        for number, item in enumerate(loaded, start=1):
            if self._sharded is not None:
                self._sharded.sync_gradients(number == len(loaded))
            if (batch := self.complete(item.batch)) is not None:
                yield batch

    def complete(self, batch: Batch | None) -> Batch | None:
        """The batch; with fsdp, one that runs every layer, since all processes have to."""
        return batch if self._sharded is None else self._sharded.complete(batch)

    def reduce_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum the gradients over the processes, once a step.

        A bucket of them is under way while the next one is packed. A parameter without a gradient
        in some processes (whose batches had no image) counts as zero there; one without a gradient
        in any process keeps none. fsdp has summed its shares in the backward pass.
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
        under_way: deque[tuple] = deque()
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.float().flatten() for gradient in bucket])
            under_way.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
            if len(under_way) > 1:
                _unpack(*under_way.popleft())
        for sent in under_way:
            _unpack(*sent)

    def clip(self, parameters: Sequence[nn.Parameter], largest: float) -> Tensor:
        """Scale the gradients down to the norm `largest`; returns their norm before, a scalar."""
        clip = nn.utils.clip_grad_norm_ if self._sharded is None else self._sharded.clip
        return clip(parameters, largest)

    def reshard(self) -> None:
        """With fsdp, free the layers that a forward pass without a backward one left gathered."""
        if self._sharded is not None:
            self._sharded.reshard()

    def whole(self, model: VisionLanguageModel) -> VisionLanguageModel | None:
        """The whole model in rank 0, with fsdp a new one on the CPU; None in the others.

        All processes have to call it.
        """
        if self._sharded is not None:
            return self._sharded.whole()
        return model if self.is_main else None


def _connect(backend: str) -> None:
    try:
        dist.init_process_group(backend, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise NanoVLMError(
            f"the processes do not find each other ({first_line(error)}); start them with torchrun"
        ) from None


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
    shaped = [part.view_as(gradient) for part, gradient in zip(parts, bucket)]
    torch._foreach_copy_(bucket, shaped)  # pyright: ignore[reportPrivateImportUsage]
