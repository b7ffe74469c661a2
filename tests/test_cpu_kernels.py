"""What the numba kernels share: elements of every dtype, the cache of compiled code, and when they run."""

import ast
import copy
import errno
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numba_kernels
import pytest
import torch
from paged_lists import make_lists

import kvops
from kvops import checks

pytest.importorskip("numba")

from test_cpu_threads import assert_same_bits, call

from kvops.kernels.cpu import elements, jit, linear
from kvops.models.linear import Linear, after_attention, rotated_heads


@pytest.mark.parametrize("dtype", list(elements.FORMATS))
@pytest.mark.parametrize("count", [1, 7, 16, 33, 256])
def test_every_element_is_widened_exactly_and_nothing_behind_a_row_is_read(dtype, count):
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
    x = (torch.arange(count * 97) * 40503 % (1 << 31)).to(bits).view(dtype)[-count:]  # the memory ends with them
    width = elements.padded(count)
    out = torch.full((width,), math.nan)
    elements.widen(x.data_ptr(), elements.FORMATS[dtype], count, out.data_ptr())
    assert torch.equal(out[:count].nan_to_num(nan=7.0), x.float().nan_to_num(nan=7.0))
    assert out[count : -(-count // 8) * 8].eq(0).all()


def test_one_element_may_be_strided():
    lists = make_lists([[5, 9]], block_size=4, head_dim=1)
    q = torch.randn(1, 1, 2, 1)
    expected = call(lists, q)
    for name in ("k_cache", "v_cache"):
        cache = getattr(lists, name)
        setattr(
            lists,
            name,
            cache.new_empty(*cache.shape[:2], 3)[..., :1].copy_(cache).as_strided(cache.shape, (3 * 4, 3, 2)),
        )
    assert_same_bits(call(lists, q), expected)


@pytest.mark.parametrize("dtype", [dtype for dtype in elements.FORMATS if dtype.itemsize < 4])
def test_all_numbers_of_a_small_dtype_are_widened_exactly(dtype):
    bits = {1: torch.uint8, 2: torch.int16}[dtype.itemsize]
    x = torch.arange(1 << (8 * dtype.itemsize)).to(bits).view(dtype)
    out = torch.empty(len(x))
    elements.widen(x.data_ptr(), elements.FORMATS[dtype], len(x), out.data_ptr())
    assert_same_numbers(out, x.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_numbers_are_rounded_to_even(dtype):
    """All numbers of the dtype, what lies halfway between two, and the float32 numbers beside these."""
    numbers = torch.arange(1 << 15).to(torch.int16).view(dtype).float()
    numbers = numbers[numbers.isfinite()]
    middles = torch.cat(((numbers[1:] + numbers[:-1]) / 2, 2 * numbers[-1:] - (numbers[-1:] + numbers[-2:-1]) / 2))
    infinity = torch.tensor(math.inf)
    special = torch.tensor([math.inf, math.nan, 1e-45, 1e-30, 6.6e4, 7e4, 1e30, torch.finfo(torch.float32).max])
    x = torch.cat((numbers, middles, middles.nextafter(infinity), middles.nextafter(-infinity), special))
    x, spare = torch.cat((x, -x)), torch.empty(16)
    out = torch.empty(len(x), dtype=dtype)
    elements.narrow(x.data_ptr(), elements.FORMATS[dtype], len(x), out.data_ptr(), spare.data_ptr())
    assert_same_numbers(out, x.to(dtype))


def assert_same_numbers(result, expected):
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))
    assert torch.equal(result.signbit() & ~result.isnan(), expected.signbit() & ~expected.isnan())


def test_processors_that_do_not_convert_float16_have_the_same_numbers(tmp_path):
    """LLVM ended the process: it called functions that were not there."""
    own = ["widened or rounded_to_even", "-p", "no:cacheprovider", "--override-ini", "addopts=--import-mode=importlib"]
    environment = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "KVOPS_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", *own]
    run = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_powers_of_two_err_by_less_than_two_units_in_the_last_place():
    x = torch.cat([torch.linspace(-126, 0, 4001), torch.linspace(-1e-3, 1e-3, 101)])
    exact = torch.exp2(x.double())
    result = torch.tensor([elements.exp2(value) for value in x.numpy()], dtype=torch.float64)
    assert ((result - exact).abs() / exact).max() < 2 * 2**-23
    special = torch.tensor([-math.inf, -200.0, -127.5, math.nan])
    assert [elements.exp2(value) for value in special.numpy()][:3] == [0.0, 0.0, 0.0]
    assert math.isnan(elements.exp2(special.numpy()[3]))


def test_tanh_errs_by_few_units_in_the_last_place_near_zero_too():
    """The quotient errs most at 0.25, where the series ends: 1.9 times the error of t, which is 2.5 units (2 of exp2
    and 0.5 of its argument), and 1.5 units of its own."""
    near_zero = 2.0 ** torch.linspace(-100, -2, 2001)
    x = torch.cat([near_zero, torch.linspace(0.25, 12, 4001)])
    x = torch.cat([x, -x])
    exact = torch.tanh(x.double())
    result = torch.tensor([elements.tanh(value) for value in x.numpy()], dtype=torch.float64)
    assert ((result - exact).abs() / exact.abs()).max() < 6.3 * 2**-23
    special = torch.tensor([0.0, math.inf, -math.inf, math.nan])
    assert [elements.tanh(value) for value in special.numpy()][:3] == [0.0, 1.0, -1.0]
    assert math.isnan(elements.tanh(special.numpy()[3]))


@pytest.mark.parametrize(("out_features", "in_features"), [(40, 32), (4, 16), (2048, 96), (36, 1536)])
def test_products_of_few_rows_have_the_same_bits_whatever_stands_beside_a_row(out_features, in_features, two_threads):
    weight, x = torch.randn(out_features, in_features), torch.randn(7, in_features)
    together = linear.linear(x, weight)
    exact = x.double() @ weight.double().T
    error = (x @ weight.T - exact).abs().max()
    assert (together - exact).abs().max() <= 2 * error + 1e-6
    torch.set_num_threads(3)
    for row in range(7):
        assert torch.equal(linear.linear(x[row : row + 1], weight)[0], together[row])


def seen_by_hooks(*modules):
    """The modules that run from now on, in their order."""
    seen = []
    for module in modules:
        module.register_forward_hook(lambda module, inputs, output: seen.append(module))
    return seen


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_projections_behind_a_norm_and_a_rotary_embedding_are_those_of_torch(rows, bias, two_threads):
    heads, D = (3, 1), 24
    norm, layer = torch.nn.RMSNorm(96, eps=1e-5), Linear(96, 5 * D, bias=bias)
    torch.nn.init.normal_(norm.weight)
    x, angle = 30 * torch.randn(rows, 1, 96), torch.randn(rows, 1, 1, D)
    cos, sin = angle.cos(), angle.sin()

    def reference(norm, layer, x, cos, sin):
        q, k, v = layer(norm(x)).unflatten(-1, (5, D)).split((3, 1, 1), 2)
        return *(head * cos + head.roll(D // 2, -1) * sin for head in (q, k)), v

    with torch.no_grad():
        doubles = (copy.deepcopy(module).double() for module in (norm, layer))
        exact = reference(*doubles, x.double(), cos.double(), sin.double())
        plain, results = reference(norm, layer, x, cos, sin), rotated_heads(norm, layer, x, cos, sin, heads)
        torch.set_num_threads(3)
        for row in range(rows):
            alone = rotated_heads(norm, layer, x[row : row + 1], cos[row : row + 1], sin[row : row + 1], heads)
            assert all(torch.equal(one[0], result[row]) for one, result in zip(alone, results, strict=True))
        seen = seen_by_hooks(norm, layer)
        hooked = rotated_heads(norm, layer, x, cos, sin, heads)
        assert seen == [norm, layer]
        for result, other, expected, same in zip(results, hooked, exact, plain, strict=True):
            allowed = 2 * (same - expected).abs().max() + 1e-6
            assert (result - expected).abs().max() <= allowed
            assert (other - expected).abs().max() <= allowed


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_layer_behind_its_attention_is_that_of_torch(rows, two_threads):
    projection, norm = Linear(64, 96, bias=False), torch.nn.RMSNorm(96, eps=1e-5)
    gate_up, down = Linear(96, 64, bias=False), Linear(32, 96, bias=False)
    torch.nn.init.normal_(norm.weight)
    x, attended = 30 * torch.randn(rows, 1, 96), torch.randn(rows, 1, 64)

    def reference(x, attended, projection, norm, gate_up, down):
        y = x + projection(attended)
        gate, up = gate_up(norm(y)).chunk(2, -1)
        return y + down(torch.nn.functional.silu(gate) * up)

    modules = projection, norm, gate_up, down
    with torch.no_grad():
        exact = reference(x.double(), attended.double(), *(copy.deepcopy(module).double() for module in modules))
        error = (reference(x, attended, *modules) - exact).abs().max()
        result = after_attention(x, attended, *modules)
        assert (result - exact).abs().max() <= 2 * error + 1e-6
        torch.set_num_threads(3)
        for row in range(rows):
            alone = after_attention(x[row : row + 1], attended[row : row + 1], *modules)
            assert torch.equal(alone[0], result[row])
        seen = seen_by_hooks(*modules)
        torch.testing.assert_close(after_attention(x, attended, *modules), result)
        assert seen == [*modules]


@pytest.mark.parametrize("gate", [0.0, 100.0, -100.0, 300.0, -300.0, math.nan])
def test_the_gate_behind_attention_takes_every_number(gate):
    gate_up = torch.zeros(64, 32)
    gate_up[:32, 0] = gate_up[32:, 1] = 1  # the normalised x has the gate in front, then what it lets through
    x = torch.zeros(1, 32)
    x[0, :2] = torch.tensor([1.0, -1.0]) * 4  # whose root mean square is 1
    norm = torch.tensor([gate / 4, -0.5] + 30 * [1.0])
    out = linear.after_attention(x, x, torch.zeros(32, 32), norm, gate_up, torch.eye(32), 0.0)
    expected = x + torch.nn.functional.silu(torch.tensor(gate).double()).float() * 2
    torch.testing.assert_close(out, expected, equal_nan=True)


@pytest.mark.parametrize("reduce", ["sum", "sumsq", "max"])
def test_long_sums_of_probabilities_lose_no_more_than_torchs(reduce):
    q, k = torch.randn(1, 2048, 2, 16), torch.randn(1, 64, 2, 16)

    def reference(q, k, lse):
        p = torch.exp(q.transpose(1, 2) @ k.permute(0, 2, 3, 1) / 4 - lse.to(q.dtype)[..., None])
        return {"sum": p.sum(2), "sumsq": p.square().sum(2), "max": p.amax(2)}[reduce]

    lse = torch.logsumexp(q.double().transpose(1, 2) @ k.double().permute(0, 2, 3, 1) / 4, -1).float()
    exact = reference(q.double(), k.double(), lse)
    error = (reference(q, k, lse) - exact).abs().max()
    result = kvops.attention_scores(q, k, lse, reduce=reduce)
    assert (result - exact).abs().max() <= 2 * error + exact.abs().max() * 2**-24


def test_the_models_linear_layer_takes_the_kernel_for_few_rows_alone(monkeypatch):
    served = []
    multiply = linear.linear
    monkeypatch.setattr(linear, "linear", lambda *arguments: served.append(1) or multiply(*arguments))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    layer, x = Linear(32, 40), torch.randn(2, 3, 32)
    expected = layer(x)  # with a gradient
    assert not served
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(layer(x.transpose(0, 1)), expected.transpose(0, 1))
        assert len(served) == 2
        torch.testing.assert_close(torch.func.vmap(layer)(x), expected)
        torch.testing.assert_close(layer(torch._neg_view(-x)), expected)  # memory holds the opposite
        layer(torch.randn(40, 32))
        layer.to(torch.bfloat16)(x.bfloat16())
        torch.compile(layer.float(), backend="eager", fullgraph=True)(x)
        monkeypatch.setenv("KVOPS_CPU", "eager")
        layer(x)
    assert len(served) == 2


def test_what_does_not_fit_the_models_kernels_is_left_to_torch(two_threads):
    """They read memory by address: what has another shape or dtype must not reach them."""
    norm, layer, hidden = torch.nn.RMSNorm(32, eps=1e-5), Linear(32, 96, bias=True), torch.randn(2, 3, 32)
    angle = torch.randn(1, 3, 1, 24)
    modules = Linear(48, 32, bias=False), norm, Linear(32, 64, bias=False), Linear(32, 32, bias=False)
    with torch.no_grad():
        for x in (torch.randn(2, 16), torch.randn(2, 64)):
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                layer(x)
        for attended in (torch.randn(2, 3, 32), torch.randn(2, 3, 48).double()):
            with pytest.raises(RuntimeError, match=r"cannot be multiplied|same dtype"):
                after_attention(hidden, attended, *modules)
        one_for_all = rotated_heads(norm, layer, hidden, angle.cos(), angle.sin(), (2, 1))
        repeated = [table.expand(2, 3, 1, 24).contiguous() for table in (angle.cos(), angle.sin())]
        for result, expected in zip(one_for_all, rotated_heads(norm, layer, hidden, *repeated, (2, 1)), strict=True):
            torch.testing.assert_close(result, expected)
        for other in (torch.nn.RMSNorm(32), torch.nn.RMSNorm(32, elementwise_affine=False)):  # no eps, no weight
            for result, expected in zip(
                rotated_heads(other, layer, hidden, *repeated, (2, 1)),
                rotated_heads(norm, layer, hidden, *repeated, (2, 1)),
                strict=True,
            ):
                torch.testing.assert_close(result, expected, atol=1e-3, rtol=1e-3)
        attended, biased = torch.randn(2, 3, 48), Linear(48, 32, bias=True)
        biased.weight = modules[0].weight
        torch.testing.assert_close(
            after_attention(hidden, attended, biased, *modules[1:]),
            after_attention(hidden + biased.bias, attended, *modules),
        )
        expected = layer(hidden)
        layer.bias = torch.nn.Parameter(torch.stack((layer.bias, layer.bias), 1)[:, 0])  # not contiguous
        torch.testing.assert_close(layer(hidden), expected)


def test_compiled_code_is_kept_apart_for_every_state_of_the_sources(tmp_path, monkeypatch):
    monkeypatch.setenv("KVOPS_CACHE_DIR", str(tmp_path))
    jit._state.cache_clear()
    first = jit.cache_folder()
    monkeypatch.setattr(jit.numba, "__version__", "0.0")
    jit._state.cache_clear()
    try:
        assert jit.cache_folder() != first
        assert jit.cache_folder().is_relative_to(tmp_path)
    finally:
        jit._state.cache_clear()


def compiled_anew():
    """The same function every time, as the next process finds it: compiled at its first call, or read."""
    jit._tell_once.cache_clear()

    @jit.jit
    def add(x, y):
        return x + y

    return add


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """A folder of its own, with the function for whole numbers."""
    monkeypatch.setenv("KVOPS_CACHE_DIR", str(tmp_path))
    assert compiled_anew()(2, 3) == 5
    return tmp_path


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
def test_compiled_code_that_is_damaged_is_made_anew(kept, caplog, suffix):
    (file,) = kept.rglob(f"*add*.{suffix}")
    file.write_bytes(file.read_bytes()[:-9])
    assert compiled_anew()(2, 3) == 5
    assert "cannot be read" in caplog.text
    caplog.clear()
    function = compiled_anew()
    assert function(2, 3) == 5
    assert sum(function.stats.cache_hits.values()) == 1
    assert not caplog.records


def test_compiled_code_is_used_also_where_the_disk_is_full(kept, monkeypatch, caplog):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    function = compiled_anew()
    assert function(2.0, 3.0) == 5
    assert function(2.0, 3) == 5
    assert caplog.text.count("No space left on device") == 1
    assert "KVOPS_CACHE_DIR" in caplog.text


def tell_at_once(monkeypatch):
    """On a busy machine a timer of no time may come too late."""

    def start(timer):
        timer.function(*timer.args)

    monkeypatch.setattr(jit.threading.Timer, "start", start)


@pytest.mark.parametrize("why", ["no home directory", "not a folder"])
def test_what_cannot_be_kept_is_compiled_for_one_process(monkeypatch, tmp_path, caplog, why):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if why == "not a folder":
        (tmp_path / "file").touch()
        monkeypatch.setenv("KVOPS_CACHE_DIR", str(tmp_path / "file"))
    else:
        monkeypatch.delenv("KVOPS_CACHE_DIR", raising=False)
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)

    add = compiled_anew()
    tell_at_once(monkeypatch)
    assert jit.compiled(add, (jit.numba.int64, jit.numba.int64))(2, 3) == 5
    assert Path(add._cache.cache_path).parent == Path(tempfile.gettempdir())
    assert "for this process alone" in caplog.text


def test_what_is_compiled_before_the_tests_is_every_kernel():
    """Both processes of a parallel run would compile one that is missing."""
    unpacked = [
        name
        for path in numba_kernels.FOLDER.glob("*.py")
        for name in re.findall(r"unpack\((\w+), ", path.read_text(encoding="utf-8"))
    ]
    assert sorted(call.__name__ for _, call in numba_kernels.entry_points()) == sorted(unpacked)


def test_a_long_compilation_is_told(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("KVOPS_CACHE_DIR", str(tmp_path))
    tell_at_once(monkeypatch)
    function = jit.compiled(compiled_anew(), (jit.numba.int64, jit.numba.int64))
    assert function(2, 3) == 5
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "test_cpu_kernels" in caplog.text
    assert str(tmp_path) in caplog.text


def test_eager_is_chosen_by_a_variable_and_without_numba(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.delenv("KVOPS_CPU", raising=False)
    assert kvops.backend("cpu") == "numba"
    monkeypatch.setenv("KVOPS_CPU", "eager")
    assert kvops.backend("cpu") == "eager"
    monkeypatch.delenv("KVOPS_CPU")
    assert checks.has_numba.__wrapped__()
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    assert not checks.has_numba.__wrapped__()
    monkeypatch.setattr(checks, "has_numba", lambda: False)
    assert kvops.backend("cpu") == "eager"
    monkeypatch.setenv("KVOPS_CPU", "numba")  # never a silent fallback
    assert kvops.backend("cpu") == "numba"
    monkeypatch.setenv("KVOPS_CPU", "Eager")
    with pytest.raises(ValueError, match="KVOPS_CPU: expected 'eager' or 'numba', got 'Eager'"):
        kvops.flash_attention(*torch.randn(3, 1, 4, 2, 8))


def test_numba_comes_in_at_the_first_call():
    code = """
import sys, torch, kvops
assert "numba" not in sys.modules
kvops.flash_attention(*torch.randn(3, 1, 4, 2, 8))
assert "numba" not in sys.modules
lens = torch.tensor([[3]], dtype=torch.int32)
kvops.paged_attention(torch.randn(1, 1, 1, 8), *torch.randn(2, 1, 4, 8), lens[None] * 0, lens)
assert "numba" in sys.modules and "triton" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"TRITON_INTERPRET": "0"})


def test_every_result_of_a_cpu_kernel_names_its_dtype():
    """Under another default dtype a kernel wrote float32 into a smaller bfloat16 tensor."""
    folder = Path(kvops.__file__).parent / "kernels" / "cpu"
    calls = [
        (path.name, node)
        for path in sorted(folder.glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.empty", "torch.zeros", "torch.full")
    ]
    assert len(calls) > 10
    assert not [ast.unparse(node) for _, node in calls if "dtype" not in {keyword.arg for keyword in node.keywords}]
