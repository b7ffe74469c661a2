"""Runs the PTX that Triton compiles, on a CPU, and watches what it does to memory: no GPU, no ptxas.

    with on_machine("sm_90") as machine:
        flash_forward(q, k, v, causal=True)      # a launch function, CPU tensors
    raise_faults(machine.executions)             # races, bounds, alignment, uninitialised memory, deadlock

It sees what the compiler made of a kernel: every barrier, wait, fence and copy of it. It does not see what ptxas makes
of that, and no time.
"""

from kvops.autotune.machine.grid import LOCKSTEP, Options
from kvops.autotune.machine.launch import MACHINES, Machine, on_machine
from kvops.autotune.machine.report import Execution, Fault, MachineFaultError, raise_faults

__all__ = [
    "LOCKSTEP",
    "MACHINES",
    "Execution",
    "Fault",
    "Machine",
    "MachineFaultError",
    "Options",
    "on_machine",
    "raise_faults",
]
