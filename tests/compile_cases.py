"""The launches that are compiled for GPUs on machines without one: realistic calls of every kernel family.

Each case calls a LAUNCH function of ``kvops.kernels`` with CPU tensors inside ``kvops.autotune.inspect.compile_only``:
the kernels compile and nothing runs, so outputs hold garbage and a case must not look at them. Import the launch
function inside the case. Keep the list short (a kernel costs 1 to 2 s for each target): one dtype and head size unless
another compiles differently, but every constexpr branch that ships. For example::

    def attention_float16_head_dim_128():
        from kvops.kernels.attention import flash_forward

        q = torch.empty(1, 1024, 8, 128, dtype=torch.float16)
        k, v = torch.empty(2, 1, 1024, 2, 128, dtype=torch.float16)
        flash_forward(q, k, v, causal=True)

    CASES += [CompileCase("attention-fp16-d128", attention_float16_head_dim_128, matrix=("flash_forward_kernel",))]

``matrix`` names the kernels that must use the GPU's matrix instructions. ``python -m kvops.autotune inspect --cases
tests/compile_cases.py`` prints what was compiled; ``tests/test_compile.py`` holds it to the limits of each target.
"""

from kvops.autotune.inspect import CompileCase

CASES: list[CompileCase] = []
