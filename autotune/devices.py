"""Properties of GPUs by name, and the distance between two GPUs.

A GPU may use a configuration that was measured on a similar one. Similarity follows from properties and not from the
architecture alone, so that H100, H200 and H20 stay distinct. Numbers are from the vendors' data sheets; matrix peaks
are dense bfloat16 with float32 accumulation.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from kvops.autotune.architectures import family

# The farthest GPU that a configuration is borrowed from: H100 to H200 is 0.5, H100 to H20 is 1.0, A100 to A10 is 2.6.
MAX_DEVICE_DISTANCE = 1.5


class LaunchDevice(Protocol):
    """The properties of a GPU that a launch has: ``kvops.kernels.device.Device``."""

    @property
    def name(self) -> str: ...
    @property
    def arch(self) -> str: ...
    @property
    def num_sms(self) -> int: ...
    @property
    def shared_memory(self) -> int: ...


@dataclass(frozen=True)
class DeviceFacts:
    """A GPU. ``shared_memory`` is bytes one program may use, ``l2`` and ``memory`` are bytes, ``bandwidth`` is GB/s,
    ``matrix_tflops`` the peak of the matrix units, ``power`` watts. 0 means unknown."""

    name: str
    arch: str
    num_sms: int
    shared_memory: int
    l2: int = 0
    bandwidth: int = 0
    matrix_tflops: int = 0
    memory: int = 0
    power: int = 0

    @property
    def nvidia(self) -> bool:
        return self.arch.startswith("sm_")

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: object) -> DeviceFacts:
        """Raises ValueError unless ``value`` has exactly the fields of a device."""
        if not isinstance(value, Mapping) or set(value) != set(cls.__dataclass_fields__):
            raise ValueError(f"device: expected the fields {', '.join(cls.__dataclass_fields__)}, got {value!r:.200}")
        for name, kind in (("name", str), ("arch", str)):
            if not isinstance(value[name], kind) or not 0 < len(value[name]) <= 128:
                raise ValueError(f"device.{name}: expected a short string, got {value[name]!r:.100}")
        for name in set(value) - {"name", "arch"}:
            number = value[name]
            if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 1 << 48:
                raise ValueError(f"device.{name}: expected an integer from 0 to 2^48, got {number!r:.100}")
        if not value["num_sms"] or not value["shared_memory"]:
            raise ValueError("device: expected num_sms and shared_memory above 0")
        return cls(**value)


_MIB, _GB = 1 << 20, 10**9
_SM_80, _SM_86, _SM_90 = 166_912, 101_376, 232_448


def _gpu(
    name: str, arch: str, sms: int, shared: int, l2_mib: int, bandwidth: int, tflops: int, memory: int, power: int
) -> DeviceFacts:
    return DeviceFacts(name, arch, sms, shared, l2_mib * _MIB, bandwidth, tflops, memory * _GB, power)


# The first device of an architecture represents it where only the architecture is known.
KNOWN_DEVICES: dict[str, DeviceFacts] = {
    device.name: device
    for device in (
        _gpu("NVIDIA A100-SXM4-80GB", "sm_80", 108, _SM_80, 40, 2039, 312, 80, 400),
        _gpu("NVIDIA A100-SXM4-40GB", "sm_80", 108, _SM_80, 40, 1555, 312, 40, 400),
        _gpu("NVIDIA A100 80GB PCIe", "sm_80", 108, _SM_80, 40, 1935, 312, 80, 300),
        _gpu("NVIDIA A100-PCIE-40GB", "sm_80", 108, _SM_80, 40, 1555, 312, 40, 250),
        _gpu("NVIDIA A40", "sm_86", 84, _SM_86, 6, 696, 150, 48, 300),
        _gpu("NVIDIA A10", "sm_86", 72, _SM_86, 6, 600, 125, 24, 150),
        _gpu("NVIDIA GeForce RTX 3090", "sm_86", 82, _SM_86, 6, 936, 71, 24, 350),
        _gpu("NVIDIA L40S", "sm_89", 142, _SM_86, 96, 864, 362, 48, 350),
        _gpu("NVIDIA L4", "sm_89", 58, _SM_86, 48, 300, 121, 24, 72),
        _gpu("NVIDIA GeForce RTX 4090", "sm_89", 128, _SM_86, 72, 1008, 165, 24, 450),
        _gpu("NVIDIA H100 80GB HBM3", "sm_90", 132, _SM_90, 50, 3350, 989, 80, 700),
        _gpu("NVIDIA H100 PCIe", "sm_90", 114, _SM_90, 50, 2039, 756, 80, 350),
        _gpu("NVIDIA H100 NVL", "sm_90", 132, _SM_90, 50, 3938, 835, 94, 400),
        _gpu("NVIDIA H200", "sm_90", 132, _SM_90, 50, 4800, 989, 141, 700),
        _gpu("NVIDIA GH200 480GB", "sm_90", 132, _SM_90, 50, 4000, 989, 96, 900),
        _gpu("NVIDIA H20", "sm_90", 78, _SM_90, 60, 4000, 148, 96, 500),
        _gpu("NVIDIA B200", "sm_100", 148, _SM_90, 126, 8000, 2250, 180, 1000),
        _gpu("NVIDIA B300", "sm_103", 148, _SM_90, 126, 8000, 2250, 270, 1100),
        _gpu("NVIDIA GeForce RTX 5090", "sm_120", 170, _SM_86, 96, 1792, 209, 32, 575),
        _gpu("NVIDIA RTX PRO 6000 Blackwell Server Edition", "sm_120", 188, _SM_86, 128, 1597, 252, 96, 600),
        _gpu("NVIDIA GB10", "sm_121", 48, _SM_86, 24, 273, 0, 128, 140),
        _gpu("AMD Instinct MI300X", "gfx942", 304, 65_536, 32, 5300, 1307, 192, 750),
        _gpu("AMD Instinct MI325X", "gfx942", 304, 65_536, 32, 6000, 1307, 256, 1000),
        _gpu("AMD Instinct MI355X", "gfx950", 256, 163_840, 32, 8000, 2516, 288, 1400),
        _gpu("AMD Instinct MI350X", "gfx950", 256, 163_840, 32, 8000, 2300, 288, 1000),
    )
}


def by_name(name: str) -> DeviceFacts:
    """The first device of :func:`matching`."""
    return matching(name)[0]


def matching(name: str) -> list[DeviceFacts]:
    """The known devices that match ``name``, with the one that represents them first.

    A whole name comes before a part of one: ``"NVIDIA H200"`` or ``"H200"``, in upper or lower case, is one device;
    ``"H100"`` is every device with that word in its name and ``"sm_90"`` every device of that architecture.

    Raises ValueError for a name that fits no device; the message has similar names.
    """
    devices = list(KNOWN_DEVICES.values())
    words = _words(name)
    for fits in (
        lambda device: _words(device.name) == words or _words(device.name)[1:] == words,
        lambda device: device.arch == name,
        lambda device: f" {' '.join(words)} " in f" {' '.join(_words(device.name))} ",
    ):
        if words and (found := [device for device in devices if fits(device)]):
            return found
    raise ValueError(
        f"device: expected the name of a GPU, such as H100 or 'AMD Instinct MI300X', or an architecture among "
        f"{', '.join(sorted({device.arch for device in devices}))}, got {name!r}{_resembling(words)}"
    )


def _words(name: str) -> list[str]:
    return re.findall("[a-z0-9]+", name.lower())


def _resembling(words: Sequence[str]) -> str:
    known = {word: name for name in reversed(KNOWN_DEVICES) for word in _words(name)}
    close = [known[word] for given in words for word in difflib.get_close_matches(given, known, n=3, cutoff=0.7)]
    return f"; did you mean {' or '.join(dict.fromkeys(close))}?" if close else ""


def facts_of(device: LaunchDevice) -> DeviceFacts:
    """The properties of the GPU of a launch: those of the driver, and from the table those of the data sheet.

    A GPU that is not in the table has no bandwidth and no peak.
    """
    known = KNOWN_DEVICES.get(device.name)
    if known is None and device.name == device.arch:
        known = next((entry for entry in KNOWN_DEVICES.values() if entry.arch == device.arch), None)
    if known is None or known.arch != device.arch:
        return DeviceFacts(device.name or device.arch, device.arch, device.num_sms, device.shared_memory)
    return replace(known, num_sms=device.num_sms, shared_memory=device.shared_memory)


def this_gpu() -> DeviceFacts:
    """The current CUDA or ROCm device by torch. Raises RuntimeError without one."""
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("no GPU: name one with --device, or an architecture; tuning needs the GPU itself")
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    arch = getattr(properties, "gcnArchName", "").split(":")[0]
    if not arch.startswith("gfx"):
        arch = f"sm_{properties.major}{properties.minor}"
    known = next((device for device in KNOWN_DEVICES.values() if device.arch == arch), None)
    # AMD's runtime does not report it. 64 KiB is the least of any GPU.
    shared = getattr(properties, "shared_memory_per_block_optin", 0) or (known.shared_memory if known else 65_536)
    return facts_of(
        DeviceFacts(properties.name, arch, properties.multi_processor_count, shared, memory=properties.total_memory)
    )


def slug(name: str) -> str:
    """A device's name as part of a file name: ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:64] or "unnamed"


def distance(ours: DeviceFacts, theirs: DeviceFacts) -> float:
    """How different two GPUs are, in doublings; infinite between architectures with different matrix instructions.

    Multiprocessors, shared memory and bandwidth count fully, the L2 cache a quarter. A property that is unknown for one
    of them counts 1.
    """
    if ours.name == theirs.name and ours.arch == theirs.arch:
        return 0.0
    total = 0.0
    if ours.arch != theirs.arch:
        if _instructions(ours.arch) != _instructions(theirs.arch):
            return math.inf
        total += 0.5
    for name, weight in (("num_sms", 1.0), ("shared_memory", 1.0), ("bandwidth", 1.0), ("l2", 0.25)):
        a, b = getattr(ours, name), getattr(theirs, name)
        total += weight * (abs(math.log2(a / b)) if a and b else float(a != b))
    return total


def _instructions(arch: str) -> str:
    """The matrix instructions of an architecture, which sm_80, sm_86 and sm_89 share, and the members of a family."""
    return "sm_8x" if arch.startswith("sm_8") else family(arch)
