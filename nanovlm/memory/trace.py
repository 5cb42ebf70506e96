"""What a device would have to do: every kernel with its bytes and FLOPs, and every tensor's life.

`Trace` records operations as PyTorch dispatches them, those of the backward pass and the optimizer
included. On a simulated device (`simulation.py`) that takes a second, and no memory.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

CUDA_ROUNDS_TO = 512  # bytes: PyTorch's allocator on CUDA gives every tensor a multiple of this
ATEN = torch.ops.aten
GATHERS = {"embedding", "index_select", "index", "gather"}  # read as much as they write
FLOPS = {**flop_registry, ATEN.addmm_: flop_registry[ATEN.addmm]}  # the registry lacks this one
FOREVER = 2**62
KNOWN: dict[tuple, Any] = {}  # an operation and its inputs → how to make its outputs
IN_PLACE = {  # operations that return their first input; with no contents, there is nothing to do
    *("add_", "sub_", "mul_", "div_", "addmm_", "addcmul_", "addcdiv_", "lerp_", "copy_", "fill_"),
    *("zero_", "exp_", "neg_", "clamp_", "silu_", "sqrt_", "random_", "floor_", "round_"),
    *("scatter_add_", "masked_fill_", "index_add_", "index_copy_", "bitwise_and_"),
}


@dataclass
class Storage:
    """The memory of one or several tensors."""

    size: int  # bytes
    born: int  # the event that allocated it
    moment: str  # in which
    region: int  # a compiled region, in which it was allocated; 0: none
    cast: bool = False  # a copy of a weight in another dtype
    died: int = FOREVER
    term: str = ""  # what it holds, where that is known from the beginning


@dataclass
class Kernel:
    """A function that the device runs."""

    name: str
    moment: str
    region: int
    event: int  # the last one before it ended
    dtype: torch.dtype  # of its first input
    reads: list[tuple[int, int]] = field(default_factory=list)  # number of the storage, bytes
    writes: list[tuple[int, int]] = field(default_factory=list)
    flops: float = 0.0

    @property
    def bytes(self) -> int:
        """Read and written."""
        return sum(size for _, size in (*self.reads, *self.writes))


class Trace(TorchDispatchMode):
    """Records kernels and storages while it is entered."""

    def __init__(self, rounded_to: int = 1) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self.storages: list[Storage] = []
        self.moments: list[tuple[int, str]] = [(0, "")]  # event at which a moment began, its name
        self.regions: dict[int, int] = {}  # compiled region → the event that ended it
        self.events = 0
        self._rounded_to = rounded_to
        self._region = self._depth = 0
        self._numbers: dict[int, int] = {}  # address of a living storage → its number
        self._watches: dict[int, weakref.ref] = {}
        self._weights: set[int] = set()  # numbers of storages
        self._parameter_shapes: set[torch.Size] = set()

    def begin(self, moment: str) -> None:
        """What follows belongs to this moment."""
        self.moments.append((self.events, moment))

    def hold(self, tensors: Iterable[Tensor], term: str) -> None:
        """Say what tensors hold: those that are there already, or as soon as they are."""
        for tensor in tensors:
            number = self._number(tensor)
            self.storages[number].term = term
            if term == "weights":
                self._weights.add(number)
                self._parameter_shapes.add(tensor.shape)

    @contextmanager
    def compiled(self) -> Iterator[None]:
        """A region that is compiled into few kernels, which keep what they compute in registers."""
        self.open_region()
        try:
            yield
        finally:
            self.close_region()

    def open_region(self) -> None:
        """What follows is compiled as a whole; a region within another one belongs to it."""
        if not self._depth:
            self._region = len(self.regions) + 1
            self.regions[self._region] = FOREVER
        self._depth += 1

    def close_region(self) -> None:
        """The end of what is compiled as a whole."""
        self._depth -= 1
        if not self._depth:
            self.regions[self._region] = self.events
            self._region = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._sums_gradients(func, args):
            func = ATEN.add_.Tensor
        result = self._result(func, args, kwargs)
        inputs = _tensors((*args, *kwargs.values()))
        outputs = _tensors((result,))
        if not outputs and not func._schema.is_mutable:
            return result
        before = {tensor.untyped_storage()._cdata for tensor in inputs}
        name = func.overloadpacket.__name__
        new = [it for it in outputs if it.untyped_storage()._cdata not in before]
        for tensor in outputs:
            self._number(tensor, cast=name == "_to_copy" and self._reads_weight(inputs))
        if (new or func._schema.is_mutable) and "empty" not in name:
            self._kernel(func, args, kwargs, result, inputs, outputs)
        return result

    def _result(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """What `func` returns: the layers of a model ask for the same shapes again and again."""
        if func._schema.is_mutable:
            same = func.overloadpacket.__name__ in IN_PLACE
            return args[0] if same else func(*args, **kwargs)
        try:
            key = func, _description(args), _description(tuple(kwargs.items()))
            known = KNOWN.get(key)
        except TypeError:  # an argument that no key can be made of
            return func(*args, **kwargs)
        if known is None:
            result = func(*args, **kwargs)
            KNOWN[key] = _new_tensors(result, (*args, *kwargs.values())) or "not these alone"
            return result
        if isinstance(known, str):
            return func(*args, **kwargs)
        made = tuple(torch.empty_strided(*it[:2], dtype=it[2], device="meta") for it in known[1])
        return made if known[0] else made[0]

    def _kernel(self, func, args, kwargs, result, inputs, outputs) -> None:
        packet, name = func.overloadpacket, func.overloadpacket.__name__
        written = [(self._number(it), _bytes(it)) for it in outputs or inputs[:1]]
        reads = [(self._number(it), _bytes(it)) for it in inputs]
        if name in GATHERS:
            reads[0] = reads[0][0], written[0][1]
        dtype = inputs[0].dtype if inputs else torch.float32
        moment = self.moments[-1][1]
        kernel = Kernel(name, moment, self._region, self.events, dtype, reads, written)
        if packet in FLOPS:
            kernel.flops = FLOPS[packet](*args, **kwargs, out_val=result)
        self.kernels.append(kernel)

    def _sums_gradients(self, func: Any, args: tuple) -> bool:
        """Whether two gradients of one weight are added.

        The autograd engine does it in place but, while a mode such as this one looks on, makes a
        third tensor.
        """
        return (
            func is ATEN.add.Tensor
            and not torch.is_grad_enabled()
            and self.moments[-1][1] == "backward"
            and args[0].shape in self._parameter_shapes
        )

    def _reads_weight(self, inputs: list[Tensor]) -> bool:
        return any(self._number(tensor) in self._weights for tensor in inputs)

    def _number(self, tensor: Tensor, cast: bool = False) -> int:
        """The number of a tensor's storage, which is noted if it is new."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._numbers:
            return self._numbers[address]
        number = len(self.storages)
        size = -(-storage.nbytes() // self._rounded_to) * self._rounded_to
        moment = self.moments[-1][1]
        self.storages.append(Storage(size, self.events, moment, self._region, cast))
        self.events += 1
        self._numbers[address] = number
        self._watches[number] = weakref.ref(storage, lambda _: self._forget(address, number))
        return number

    def _forget(self, address: int, number: int) -> None:
        del self._numbers[address], self._watches[number]
        self.storages[number].died = self.events
        self.events += 1

    def living(self) -> list[Storage]:
        """Storages that take memory.

        What a compiled region allocates and drops stays in registers.
        """
        return [
            storage
            for storage in self.storages
            if not (storage.region and storage.died <= self.regions[storage.region])
        ]

    def bytes_at(self, event: int) -> int:
        """Held after an event."""
        return sum(it.size for it in self.living() if it.born <= event < it.died)

    def peaks(self) -> dict[str, int]:
        """By moment, the event after which most bytes are held."""
        changes = dict.fromkeys((start for start, _ in self.moments), 0)
        for storage in self.living():
            changes[storage.born] = storage.size
            changes[storage.died] = -storage.size
        changes.pop(FOREVER, None)
        starts, most, found, held = [*self.moments, (FOREVER, "")], {}, {}, 0
        number = 0
        for event in sorted(changes):
            while event >= starts[number + 1][0]:
                number += 1
            held += changes[event]
            moment = starts[number][1]
            if held > most.get(moment, -1):
                most[moment], found[moment] = held, event
        return found


def _description(value: Any) -> Any:
    """A key that is equal for values that give equal shapes."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.is_meta
    if isinstance(value, list | tuple):
        return tuple(map(_description, value))
    hash(value)
    return type(value), value


def _new_tensors(result: Any, inputs: Iterable[Any]) -> tuple[bool, list[tuple]] | None:
    """Whether `result` is a tuple, and shape, stride and dtype of its tensors, if all are new."""
    outputs = result if isinstance(result, tuple) else (result,)
    old = {tensor.untyped_storage()._cdata for tensor in _tensors(inputs)}
    for output in outputs:
        meta = isinstance(output, Tensor) and output.is_meta
        if not meta or output.untyped_storage()._cdata in old:
            return None
    return isinstance(result, tuple), [(it.shape, it.stride(), it.dtype) for it in outputs]


def _bytes(tensor: Tensor) -> int:
    """What a kernel reads or writes of a tensor; an expanded one repeats what it holds."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Those on the simulated device among arguments and lists of them."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            if value.is_meta:
                found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found
