"""PTX written by hand for the machine: single instructions on given registers, and small kernels."""

import numpy as np

from kvops.autotune.machine.grid import Grid, Options
from kvops.autotune.machine.memory import Allocation
from kvops.autotune.machine.ptx import Program
from kvops.autotune.machine.report import Execution
from kvops.autotune.machine.team import Team
from kvops.autotune.machine.translate import BlockWriter

KINDS = {"p": "pred", "rs": "u16", "r": "u32", "rd": "u64"}
# %rd3: the thread's own word of the first buffer.
OWN_GLOBAL = """mov.u32 %r1, %tid.x;
ld.param.b64 %rd1, [kernel_param_0];
mul.wide.u32 %rd2, %r1, 4;
add.s64 %rd3, %rd1, %rd2;
"""
HEADER = """
.version 8.7
.target sm_90a
.address_size 64
.file 1 "/somewhere/kernel.py"
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
{parameters}
)
.reqntid {threads}
{{
    .reg .pred %p<16>;
    .reg .b16 %rs<16>;
    .reg .b32 %r<48>;
    .reg .b64 %rd<16>;
    .loc 1 1 0
{body}
}}
"""


def program(body: str, parameters: int = 0, threads: int = 32, without=()) -> Program:
    named = ",\n".join(f".param .u64 .ptr .global .align 1 kernel_param_{number}" for number in range(parameters))
    # Line n of the body is line n of kernel.py.
    lines = [f".loc 1 {number} 0\n{line}" for number, line in enumerate(body.strip().splitlines(), 1)]
    return Program(HEADER.format(parameters=named, threads=threads, body="\n".join(lines)), without)


def execute(text: str, registers: dict[str, tuple[str, object]], parameters: int = 0) -> Team:
    """One instruction (or a few) by a warp whose registers hold these values, ``{"%r1": ("f32", 1.5)}``; a list gives
    a value to each lane."""
    held = program(text + "\nret;", parameters)
    grid = Grid(held, (1,), {}, [], 1024, 1, options=Options(check=False))
    grid.clocks.clear(0)
    team = Team(grid, [0], [0], [0])
    grid._teams[0] = [team]
    for name, (dtype, values) in registers.items():
        register = held.register(name)
        row = team.rows[dtype][register.index]
        array = np.array(values, dtype=row.dtype) if not isinstance(values, np.ndarray) else values
        row[:] = np.resize(array, 32) if array.ndim else array
    with np.errstate(all="ignore"):
        BlockWriter(held, 0, False, frozenset()).function()(team, None)
    return team


def result(team: Team, name: str, dtype: str) -> np.ndarray:
    return team.rows[dtype][team.grid.program.register(name).index]


def run(body: str, *buffers: np.ndarray, **options) -> Execution:
    """Run a kernel; see :func:`prepared`."""
    return prepared(body, *buffers, **options).run()


def prepared(
    body: str,
    *buffers: np.ndarray,
    warps: int = 1,
    shared: int = 1024,
    grid: int = 1,
    written: dict[int, bool] | None = None,
    descriptors=None,
    without=(),
    **options,
) -> Grid:
    """A kernel on these buffers, its parameters; ``written`` says False of a buffer that holds no data yet."""
    held = program(body, len(buffers), 32 * warps, without)
    allocations = []
    for number, buffer in enumerate(buffers):
        flags = None if (written or {}).get(number, True) else np.zeros(buffer.nbytes, bool)
        allocations.append(Allocation(buffer.ctypes.data, buffer.nbytes, flags))
    parameters = {f"kernel_param_{n}": buffer.ctypes.data.to_bytes(8, "little") for n, buffer in enumerate(buffers)}
    return Grid(held, (grid,), parameters, allocations, shared, warps, descriptors, options=Options(**options))


def kinds(execution) -> list[str]:
    return [fault.kind for fault in execution.faults]


def words(count=64):
    return np.zeros(count, np.uint32)
