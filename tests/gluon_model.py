"""A model of a Hopper multiprocessor, enough to run the source of the warp-specialised kernels on a CPU.

Triton has no interpreter for Gluon. Here the kernel's functions run as plain Python with ``gl``, ``mbarrier``, ``tma``
and the matrix products replaced: each warp group is a thread, exactly one of which runs at a time, and a seeded random
choice decides at every synchronisation which one goes on and when a TMA copy arrives. What the hardware does late
happens late: a matrix product reads its operands when it is waited for, an output leaves shared memory when the store
is waited for, and a tile that is being copied reads as NaN.

It raises ``ProtocolError`` for a deadlock, a slot that is overwritten while it is read or before every reader gave it
back, too many arrivals at a barrier, an arrival that is not preceded by a barrier of the warp group, and data written
by threads that the copy engine reads without a fence, or before an arrival of theirs where another group starts it.
"""

import random
import threading
import types

import torch
from gluon_memory import (
    DTYPES,
    AbortError,
    Allocation,
    Descriptor,
    Pointer,
    Product,
    ProtocolError,
    Slot,
    Value,
    raw_data,
)
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction


class Group(threading.Thread):
    """A warp group: a thread that runs while it holds the multiprocessor's baton."""

    def __init__(self, sm, function, arguments):
        super().__init__(daemon=True)
        self.sm = sm
        self.function = function
        self.arguments = arguments
        self.baton = threading.Semaphore(0)
        self.ready = lambda: True
        self.done = False
        self.error = None
        self.products = []
        self.stores = []
        self.together = False

    def run(self):
        self.baton.acquire()
        try:
            if not self.sm.aborted:
                self.function(*self.arguments)
        except AbortError:
            pass
        except BaseException as error:
            self.error = error
        self.done = True
        self.sm.baton.release()

    def pause(self, ready=lambda: True):
        self.ready = ready
        self.sm.baton.release()
        self.baton.acquire()
        if self.sm.aborted:
            raise AbortError


class Multiprocessor:
    """Runs programs of ``kernel`` one after another, in an order of events that ``seed`` decides.

    ``replace``, given the functions' globals, returns one of them changed.
    """

    def __init__(self, kernel, seed, replace=None):
        self.random = random.Random(seed)
        self.baton = threading.Semaphore(0)
        self.aborted = False
        self.current = None
        self.copies = []
        self.loaded = []
        module = dict(kernel.fn.__globals__)
        for value in list(module.values()):
            if isinstance(value, GluonJITFunction):  # what functions of other files see, too
                module = value.fn.__globals__ | module
        fakes = self._language()
        self.globals = dict(module)
        for name, value in module.items():
            if isinstance(value, GluonJITFunction):
                self.globals[name] = types.FunctionType(value.fn.__code__, self.globals, name, value.fn.__defaults__)
            elif isinstance(value, gl.constexpr):  # outside a compiler a box
                self.globals[name] = value.value
        self.globals |= fakes
        if replace is not None:
            function = replace(self.globals)
            self.globals[function.__name__] = function
        self.kernel = types.FunctionType(kernel.fn.__code__, self.globals, kernel.fn.__name__)

    def __getitem__(self, grid):
        def launch(*arguments, num_warps, enable_fp_fusion, **constants):
            assert num_warps == 4
            prepared = []
            for argument in arguments:
                if hasattr(argument, "block_shape"):
                    argument = Descriptor(argument)
                elif isinstance(argument, torch.Tensor):
                    elements = argument.untyped_storage().nbytes() // argument.element_size()
                    argument = Pointer(argument.as_strided((elements - argument.storage_offset(),), (1,)))
                prepared.append(argument)
            for self.program in range(grid[0]):
                self.allocations = []
                self.kernel(*prepared, **constants)

        return launch

    def _specialize(self, partitions, warps, registers):
        self.groups = [Group(self, function, arguments) for function, arguments in partitions]
        for group in self.groups:
            group.start()
        try:
            while not all(group.done for group in self.groups):
                ready = [group for group in self.groups if not group.done and group.ready()]
                events = ready + self.copies
                if not events:
                    raise ProtocolError("deadlock")
                event = self.random.choice(events)
                if isinstance(event, Group):
                    self.current = event
                    event.baton.release()
                    self.baton.acquire()
                    if event.error is not None:
                        raise event.error
                else:
                    self.copies.remove(event)
                    event()
        finally:
            self.aborted = True
            for group in self.groups:
                if not group.done:
                    group.baton.release()
                group.join()
            self.aborted = False
            self.current = None
        if self.copies:
            raise ProtocolError("a copy was never waited for")

    # What the kernel calls.

    def _wait(self, barrier, phase):
        self.current.pause(lambda: barrier.passes(phase))
        self.current.together = False

    def _arrive(self, barrier, count=1):
        if not self.current.together:
            raise ProtocolError("an arrival that not all warps stand behind")
        for slot in self._slots():
            if slot.writer is self.current and slot.unfenced is None:
                slot.writer = None
        barrier.arrive()
        self.current.pause()

    def _expect(self, barrier, num_bytes):
        barrier.arrive(num_bytes)

    def _load(self, descriptor, coordinates, barrier, view):
        slot = view.slot
        if slot.readers or slot.copying or slot.unfenced:
            raise ProtocolError("a tile was overwritten while it is in use")
        slot.writer = None
        slot.data.fill_(float("nan"))
        slot.copying = True
        self.loaded.append((self.program, tuple(coordinates)))

        def arrive():
            descriptor.read(coordinates, slot)
            slot.copying = False
            barrier.arrived(descriptor.block_type.nbytes)

        self.copies.append(arrive)
        self.current.pause()

    def _store(self, descriptor, coordinates, view):
        writer = view.slot.writer
        handed_over = writer is None or (writer is self.current and self.current.together)
        if view.slot.unfenced or not handed_over:
            raise ProtocolError("the copy engine reads what was not fenced")
        view.slot.readers += 1
        self.current.stores.append((descriptor, list(coordinates), view.slot))
        self.current.pause()

    def _store_wait(self, pending):
        for descriptor, coordinates, slot in self.current.stores:
            descriptor.write(coordinates, slot)
            slot.readers -= 1
        self.current.stores.clear()
        self.current.together = False

    def _slots(self):
        return [item for allocation in self.allocations for item in allocation.items if isinstance(item, Slot)]

    def _fence(self):
        for slot in self._slots():
            if slot.unfenced is threading.current_thread():
                slot.unfenced = None
        if self.current is not None:
            self.current.together = False

    def _barrier(self):
        if self.current is not None:
            self.current.together = True

    def _multiply(self, a, b, accumulator, *, use_acc=True, is_async=False):
        assert is_async
        if isinstance(accumulator, Product):
            raise ProtocolError("a product accumulates onto one that was not waited for")
        product = Product(a, b, accumulator, use_acc)
        self.current.products.append(product)
        self.current.pause()
        return product

    def _multiply_wait(self, outstanding, deps):
        self.current.pause()
        while len(self.current.products) > outstanding:
            self.current.products.pop(0).finish()
        self.current.together = False
        results = [dep.result if isinstance(dep, Product) else dep for dep in deps]
        if any(result is None for result in results):
            raise ProtocolError("a product was read before it was done")
        return results[0] if len(results) == 1 else tuple(results)

    def _allocate(self, dtype, shape, layout):
        self.allocations.append(Allocation(dtype, shape))
        return self.allocations[-1]

    def _language(self):
        def full(shape, value, dtype, layout):
            return Value(torch.full(shape, value, dtype=DTYPES[dtype]), layout)

        def where(condition, a, b):
            like = a if isinstance(a, Value) else b
            return Value(torch.where(condition.data, _tensor(a, like), _tensor(b, like)), like.type.layout)

        def _tensor(value, like):
            return value.data if isinstance(value, Value) else torch.tensor(value, dtype=like.dtype)

        def load(pointer, mask=None, other=None):
            if mask is not None:
                found = pointer.tensor[torch.where(mask.data, pointer.offset, 0).long()]
                return Value(torch.where(mask.data, found, other), mask.type.layout)
            # A scalar of integers is what loops run to.
            value = pointer.tensor[pointer.offset]
            return Value(value) if value.is_floating_point() or value.dim() else int(value)

        def store(pointer, value, mask):
            pointer.tensor[pointer.offset[mask.data].long()] = value.data[mask.data]

        def extreme(function):
            return lambda a, b: Value(function(a.data, torch.as_tensor(raw_data(b), dtype=a.dtype)), a.type.layout)

        def unary(function):
            return lambda a: Value(function(a.data), a.type.layout)

        language = types.SimpleNamespace(
            constexpr=gl.constexpr,
            float32=gl.float32,
            int32=gl.int32,
            int64=gl.int64,
            NVMMADistributedLayout=gl.NVMMADistributedLayout,
            DotOperandLayout=gl.DotOperandLayout,
            SliceLayout=gl.SliceLayout,
            program_id=lambda axis: self.program,
            static_range=range,
            arange=lambda start, end, layout: Value(torch.arange(start, end, dtype=torch.int32), layout),
            full=full,
            zeros=lambda shape, dtype, layout: full(shape, 0, dtype, layout),
            where=where,
            to_tensor=lambda value: Value(torch.tensor(value)),
            load=load,
            store=store,
            maximum=extreme(torch.maximum),
            minimum=extreme(torch.minimum),
            max=lambda a, axis: Value(a.data.amax(axis), a.type.layout),
            sum=lambda a, axis: Value(a.data.sum(axis), a.type.layout),
            exp2=unary(torch.exp2),
            log2=unary(torch.log2),
            abs=unary(torch.abs),
            expand_dims=lambda a, axis: Value(a.data.unsqueeze(axis), a.type.layout),
            convert_layout=lambda a, layout: Value(a.data, layout),
            allocate_shared_memory=self._allocate,
            warp_specialize=self._specialize,
        )
        barriers = types.SimpleNamespace(
            MBarrierLayout=lambda: None,
            init=lambda barrier, count: barrier.initialise(count),
            wait=self._wait,
            arrive=self._arrive,
            expect=self._expect,
        )
        return {
            "gl": language,
            "mbarrier": barriers,
            "tma": types.SimpleNamespace(store_wait=self._store_wait),
            "warpgroup_mma": self._multiply,
            "warpgroup_mma_wait": self._multiply_wait,
            "fence_async_shared": self._fence,
            "group_barrier": self._barrier,
            "tma_load": self._load,
            "tma_store": self._store,
        }
