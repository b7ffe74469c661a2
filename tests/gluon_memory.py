"""Values, barriers, shared memory, descriptors and products of the model of a Hopper multiprocessor (gluon_model)."""

import threading
import types

import torch
from triton.experimental.gluon import language as gl

DTYPES = {gl.float32: torch.float32, gl.int32: torch.int32, gl.int64: torch.int64}


class ProtocolError(Exception):
    pass


class AbortError(Exception):
    pass


class Value:
    """A tensor in registers."""

    def __init__(self, data, layout=None):
        self.data = data
        self.type = types.SimpleNamespace(layout=layout)
        self.shape = data.shape

    @property
    def dtype(self):
        return self.data.dtype

    def to(self, dtype):
        return Value(self.data.to(DTYPES.get(dtype, dtype)), self.type.layout)

    def _binary(self, other, function):
        layout = self.type.layout or (other.type.layout if isinstance(other, Value) else None)
        return Value(function(self.data, raw_data(other)), layout)

    def __add__(self, other):
        return self._binary(other, lambda a, b: a + b)

    def __radd__(self, other):
        return self + other

    def __sub__(self, other):
        return self._binary(other, lambda a, b: a - b)

    def __rsub__(self, other):
        return self._binary(other, lambda a, b: b - a)

    def __mul__(self, other):
        return self._binary(other, lambda a, b: a * b)

    def __truediv__(self, other):
        return self._binary(other, lambda a, b: a / b)

    def __rtruediv__(self, other):
        return self._binary(other, lambda a, b: b / a)

    def __and__(self, other):
        return self._binary(other, lambda a, b: a & b)

    def __lt__(self, other):
        return self._binary(other, lambda a, b: a < b)

    def __le__(self, other):
        return self._binary(other, lambda a, b: a <= b)

    def __gt__(self, other):
        return self._binary(other, lambda a, b: a > b)

    def __ge__(self, other):
        return self._binary(other, lambda a, b: a >= b)

    def __eq__(self, other):
        return self._binary(other, lambda a, b: a == b)

    __hash__ = None


def raw_data(value):
    return value.data if isinstance(value, Value) else value


class Pointer:
    """A pointer into a tensor's storage, or a tensor of such pointers."""

    def __init__(self, tensor, offset=0):
        self.tensor = tensor
        self.offset = offset

    def __add__(self, other):
        return Pointer(self.tensor, self.offset + raw_data(other))


class Barrier:
    """An mbarrier: ``completed`` phases, and what the current one still waits for."""

    def __init__(self):
        self.count = None

    def initialise(self, count):
        self.count = self.pending = count
        self.completed = self.bytes = 0

    def passes(self, parity):
        return self.completed & 1 != parity

    def arrive(self, num_bytes=0):
        if self.pending == 0:
            raise ProtocolError("more arrivals than a phase counts")
        self.pending -= 1
        self.bytes += num_bytes
        self._advance()

    def arrived(self, num_bytes):
        self.bytes -= num_bytes
        self._advance()

    def _advance(self):
        if self.pending == 0 and self.bytes == 0:
            self.completed += 1
            self.pending = self.count


class Slot:
    """One tile in shared memory."""

    def __init__(self, shape, dtype):
        self.data = torch.full(shape, float("nan"), dtype=dtype)
        self.readers = 0
        self.copying = False
        self.unfenced = None  # the group that stored to it
        self.writer = None  # the same, until it arrives somewhere with the data fenced


class View:
    """A slot, or what reshaping and permuting make of it."""

    def __init__(self, slot, transform=lambda data: data):
        self.slot = slot
        self.transform = transform
        self.dtype = slot.data.dtype

    @property
    def data(self):
        return self.transform(self.slot.data)

    @property
    def shape(self):
        return list(self.data.shape)

    def reshape(self, shape):
        return View(self.slot, lambda data: self.transform(data).view(shape))

    def permute(self, order):
        return View(self.slot, lambda data: self.transform(data).permute(*order))

    def load(self, layout):
        if self.slot.copying or self.slot.unfenced:
            raise ProtocolError("a tile is read before it arrived")
        return Value(self.data.clone(), layout)

    def store(self, value):
        if self.slot.readers or self.slot.copying:
            raise ProtocolError("a slot was stored to while it is in use")
        self.slot.unfenced = self.slot.writer = threading.current_thread()
        self.data.copy_(value.data)


class Allocation:
    """Slots or barriers in shared memory."""

    def __init__(self, dtype, shape):
        self.dtype = dtype
        self.shape = shape
        barriers = dtype is gl.int64
        self.items = [Barrier() if barriers else Slot(shape[1:], DTYPES.get(dtype, dtype)) for _ in range(shape[0])]

    def index(self, index):
        item = self.items[index]
        return View(item) if isinstance(item, Slot) else item


class Descriptor:
    """A TMA descriptor, as the hardware takes it: a base, sizes, strides in bytes and the extents of a box."""

    def __init__(self, host):
        self.tensor = host.base
        self.layout = host.layout
        self.dtype = host.base.dtype
        size = host.base.element_size()
        self.sizes, self.box = host.shape, host.block_shape
        self.strides = [stride * size for stride in host.strides]
        if len(self.sizes) > 5 or max(self.box) > 256:
            raise ProtocolError("a box that TMA refuses")
        if not all(0 < extent <= 2**32 for extent in self.sizes):
            raise ProtocolError("a size that TMA refuses")
        # The stride of a dimension of size 1 counts, too.
        if not all(0 < stride < 2**40 and stride % 16 == 0 for stride in self.strides[:-1]) or self.strides[-1] != size:
            raise ProtocolError("a stride that TMA refuses")
        elements = 1
        for extent in self.box:
            elements *= extent
        self.block_type = types.SimpleNamespace(shape=self.box, nbytes=elements * size)
        self.written = torch.zeros(self.tensor.untyped_storage().nbytes() // size, dtype=torch.bool)

    def _clipped(self, coordinates, memory=None):
        """What of a box of rows by columns lies inside, in memory and in the box: every dimension is held to its size,
        and addresses are sums modulo 2^64."""
        assert all(isinstance(coordinate, int) for coordinate in coordinates)
        if not all(-(2**31) <= coordinate < 2**31 for coordinate in coordinates):
            raise ProtocolError("a coordinate that is not an int32")
        place, address, inside = [], 0, True
        for coordinate, extent, size, stride in zip(coordinates, self.box, self.sizes, self.strides, strict=True):
            first, end = max(coordinate, 0), min(coordinate + extent, size)
            place.append(slice(first - coordinate, max(first, end) - coordinate))
            inside &= first < end
            address += first * stride
        if not inside:
            return None, None
        address = (address + 2**63) % 2**64 - 2**63
        shape = [part.stop - part.start for part in place]
        size = self.strides[-1]
        offset = self.tensor.storage_offset() + address // size
        strides = [stride // size if extent > 1 else 0 for stride, extent in zip(self.strides, shape, strict=True)]
        memory = self.tensor if memory is None else memory
        return memory.as_strided(shape, strides, offset), tuple(place)

    def read(self, coordinates, slot):
        view, place = self._clipped(coordinates)
        slot.data.zero_()
        if view is not None:
            slot.data[place] = view

    def write(self, coordinates, slot):
        view, place = self._clipped(coordinates)
        if view is not None:
            view.copy_(slot.data[place])
            marks, _ = self._clipped(coordinates, self.written)
            if marks.any():
                raise ProtocolError("two outputs lie in the same place")
            marks.fill_(True)


class Product:
    """An asynchronous matrix product: computed when it is waited for, from what shared memory holds then."""

    def __init__(self, a, b, accumulator, accumulate):
        self.operands = a, b
        self.accumulator = accumulator
        self.accumulate = accumulate
        self.result = None
        for operand in self.operands:
            if isinstance(operand, View):
                if operand.slot.copying or operand.slot.unfenced:
                    raise ProtocolError("a tile is read before it arrived")
                operand.slot.readers += 1

    def finish(self):
        a, b = self.operands
        product = a.data.float() @ b.data.float()
        if self.accumulate:
            product = product + self.accumulator.data
        self.result = Value(product, self.accumulator.type.layout)
        for operand in self.operands:
            if isinstance(operand, View):
                operand.slot.readers -= 1
