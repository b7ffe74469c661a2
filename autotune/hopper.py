"""Families of warp-specialised kernels for Hopper (Gluon), each the twin of a family for all GPUs.

They have candidates on sm_90 only. A launch uses one only if a record of that GPU shows that it is faster than its twin
(``kvops.autotune.lookup.choose_proven``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial

from kvops.autotune.config import (
    GluonFlashBackwardConfig,
    GluonFlashForwardConfig,
    gluon_flash_backward_keys_config,
    gluon_flash_backward_queries_config,
    gluon_flash_forward_config,
)
from kvops.autotune.dense_families import DENSE_KEY, DENSE_SIZES, dense_bound, dense_problems, with_window
from kvops.autotune.devices import DeviceFacts
from kvops.autotune.family_parts import refuse_shared
from kvops.autotune.spec import OpSpec, Problem

# Registers for one thread of each consumer and of the producer: 65,536 per multiprocessor, in units of 8 for 128
# threads.
_REGISTERS = 504
# (block_n, stages, consumer registers, producer registers) by padded head size.
_FORWARD_TILES = {
    64: ((128, 3, 216, 72), (128, 4, 240, 24), (64, 4, 216, 72)),
    128: ((128, 2, 240, 24), (128, 3, 240, 24), (64, 4, 240, 24)),
    256: ((64, 2, 240, 24), (32, 4, 240, 24), (32, 3, 240, 24)),
}
# (block_m, block_n, stages) by padded head size.
_KEYS_TILES = {
    64: ((64, 64, 3), (64, 64, 2), (64, 64, 4)),
    128: ((64, 64, 2), (64, 64, 3), (32, 64, 4)),
}
_QUERIES_TILES = {
    64: ((64, 128, 3), (64, 128, 2), (64, 64, 4)),
    128: ((64, 128, 2), (64, 64, 3), (64, 64, 4)),
}
# Bytes of the loop's tensors to keep in the L2 cache of 50 MiB, besides the default.
_SECTIONS = (4 << 20, 40 << 20)


def hopper_dense_problems() -> tuple[Problem, ...]:
    """The problems of dense attention in 16 bits, which Hopper's asynchronous products need."""
    return tuple(problem for problem in dense_problems() if problem["itemsize"] == 2)


def refuse_hopper(problem: Problem, device: DeviceFacts) -> str | None:
    """The reason why no configuration of these kernels can run ``problem``, or None."""
    if device.arch != "sm_90":
        return f"needs a Hopper GPU (sm_90), {device.name} is {device.arch}"
    if problem["itemsize"] != 2:
        return f"needs float16 or bfloat16, got elements of {problem['itemsize']} bytes"
    if problem["width"] > 256:
        return f"needs head sizes up to 256, got {problem['width']}"
    return None


def _width(problem: Problem) -> int:
    """The columns of a tile: at least 128 bytes."""
    return max(64, problem["width"])


def _forward_space(problem: Problem, device: DeviceFacts) -> Iterable[GluonFlashForwardConfig]:
    """Tiles first, which compile differently; then options that only change the order of work items, not the binary."""
    for place, (block_n, stages, consumer, producer) in enumerate(_FORWARD_TILES.get(_width(problem), ())):
        config = GluonFlashForwardConfig(64, block_n, stages, consumer, producer)
        yield config
        yield replace(config, persistent=False)
        if place < 2:
            yield from (replace(config, section_bytes=size) for size in _SECTIONS)


def _refuse_tiles(
    config: GluonFlashForwardConfig | GluonFlashBackwardConfig,
    owned: str,
    walked: str,
    kept: int,
    problem: Problem,
    device: DeviceFacts,
) -> str | None:
    """``owned`` and ``walked`` name the rows of a consumer and of a tile of the loop; ``kept`` is the number of
    matrices
    of the owned rows."""
    for name, least in ((owned, 64), (walked, 16)):
        rows = getattr(config, name)
        if rows < least or rows & (rows - 1):
            return f"needs {name} to be a power of two from {least} on, it is {rows}"
    registers = config.consumer_registers, config.producer_registers
    if 2 * registers[0] + registers[1] > _REGISTERS or any(not 24 <= n <= 240 or n % 8 for n in registers):
        return (
            f"needs multiples of 8 registers from 24 to 240 and {_REGISTERS} in all, it has 2 x {registers[0]} + "
            f"{registers[1]}"
        )
    rows = 2 * kept * getattr(config, owned) + 2 * config.stages * getattr(config, walked)
    return refuse_shared(2 * _width(problem) * rows, device)


def _refuse_forward(config: GluonFlashForwardConfig, problem: Problem, device: DeviceFacts) -> str | None:
    return refuse_hopper(problem, device) or _refuse_tiles(config, "block_rows", "block_n", 1, problem, device)


def _why_forward(problem: Problem, device: DeviceFacts, config: GluonFlashForwardConfig) -> str:
    return (
        f"{dense_bound(2, problem, device)}; the largest tiles that registers hold, two consumers of "
        f"{config.block_rows} x {config.block_n}"
    )


def _forward(name: str, operator: str) -> OpSpec:
    return OpSpec(
        name=name,
        twin="flash_forward",
        config=GluonFlashForwardConfig,
        key=DENSE_KEY,
        sizes=DENSE_SIZES,
        heuristic=lambda p, d: gluon_flash_forward_config(_width(p)),
        reason=_why_forward,
        space=_forward_space,
        refuse=_refuse_forward,
        # The order of work items, the depth of the ring and the split of registers do not change a sum.
        numerics=lambda config: (config.block_rows, config.block_n),
        kernels=("kvops.kernels.gluon_flash_forward_kernel:gluon_flash_forward_kernel",),
        workload=f"kvops.autotune.workloads:{name}",
        problems=hopper_dense_problems(),
        proof_key=with_window,
        operators=(operator,),
    )


def _backward_space(
    tiles: Mapping[int, tuple[tuple[int, int, int], ...]], problem: Problem, device: DeviceFacts
) -> Iterable[GluonFlashBackwardConfig]:
    for place, tile in enumerate(tiles.get(_width(problem), ())):
        config = GluonFlashBackwardConfig(*tile)
        yield config
        if place < 2:
            yield from (replace(config, section_bytes=size) for size in _SECTIONS)


def _refuse_backward(
    owned: str, walked: str, config: GluonFlashBackwardConfig, problem: Problem, device: DeviceFacts
) -> str | None:
    if problem["width"] > 128:
        # At 256, dK and dV of 64 keys would take all 255 registers of a thread.
        return f"needs head sizes up to 128, got {problem['width']}"
    if config.block_m < 32:
        # Rows of lse and delta of a tile would take less than the 128 bytes of TMA's alignment.
        return f"needs block_m to be at least 32, it is {config.block_m}"
    return refuse_hopper(problem, device) or _refuse_tiles(config, owned, walked, 2, problem, device)


def _why_backward(products: int, problem: Problem, device: DeviceFacts, config: GluonFlashBackwardConfig) -> str:
    return (
        f"{dense_bound(products, problem, device)}; the largest tiles that compiled without spills, "
        f"{config.block_m} x {config.block_n} to each of two consumers"
    )


def _backward(
    name: str,
    heuristic: Callable[[int], GluonFlashBackwardConfig],
    tiles: Mapping[int, tuple[tuple[int, int, int], ...]],
    products: int,
    owned: str,
    walked: str,
) -> OpSpec:
    return OpSpec(
        name=f"gluon_{name}",
        twin=name,
        config=GluonFlashBackwardConfig,
        key=DENSE_KEY,
        sizes=DENSE_SIZES,
        heuristic=lambda p, d: heuristic(_width(p)),
        reason=partial(_why_backward, products),
        space=partial(_backward_space, tiles),
        refuse=partial(_refuse_backward, owned, walked),
        # As in the forward pass.
        numerics=lambda config: (config.block_m, config.block_n),
        kernels=(f"kvops.kernels.gluon_{name}:gluon_{name}_kernel",),
        workload=f"kvops.autotune.workloads:{name}",
        problems=tuple(problem for problem in hopper_dense_problems() if problem["width"] <= 128),
        proof_key=with_window,
        operators=("flash_attention_backward",),
    )


HOPPER_FAMILIES: tuple[OpSpec, ...] = (
    _forward("gluon_flash_forward", "flash_attention"),
    # The same source, compiled for packed sequences: the two need separate measurements.
    _forward("gluon_flash_forward_varlen", "flash_attention_varlen"),
    _backward("flash_backward_keys", gluon_flash_backward_keys_config, _KEYS_TILES, 4, "block_n", "block_m"),
    _backward("flash_backward_queries", gluon_flash_backward_queries_config, _QUERIES_TILES, 3, "block_m", "block_n"),
)
