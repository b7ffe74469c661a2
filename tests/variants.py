"""Which kernels a run would compile: every combination of types, constants and alignments that a launch makes Triton
compile again, seen in the interpreter, which compiles nothing itself."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, create_function_from_signature

_BACKEND = CUDABackend(GPUTarget("cuda", 90, 32))


@cache
def _compiled_form(kernel: InterpretedFunction):
    """The kernel as a GPU would get it, and the function by which Triton looks at the arguments of a launch."""
    options = {name: value for name, value in kernel.kwargs.items() if name.startswith("do_not_specialize")}
    function = JITFunction(kernel.fn, **options)
    return function, create_function_from_signature(function.signature, function.params, _BACKEND)


@contextmanager
def recorded_variants() -> Iterator[dict[str, set[tuple]]]:
    """Inside, each launch adds its variant to the set of its kernel's name."""
    found: dict[str, set[tuple]] = defaultdict(set)
    run = InterpretedFunction.run

    def recording(self, *args, grid, warmup, **kwargs):
        function, bind = _compiled_form(self)
        values, specialisation, options = bind(*args, **kwargs)
        variant = [
            (parameter.name, kind, values[parameter.name] if parameter.is_constexpr else attribute)
            for parameter, (kind, attribute) in zip(function.params, specialisation, strict=True)
        ]
        found[self.fn.__name__].add((*variant, *sorted(options.items())))
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    InterpretedFunction.run = recording
    try:
        yield found
    finally:
        InterpretedFunction.run = run
