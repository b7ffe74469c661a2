"""What rounding does to a computation, on no machine in particular.

A bound on an error needs the number of terms of every sum, their sizes and the dtype. Here the computation itself tells
them: it runs in float64, and each of its operations is put off by a random error of the size that the arithmetic under
test has. A run in the arithmetic itself would be one sample, drawn by the BLAS of the machine; these are several, and
the same ones everywhere.

- An elementwise result is off by up to one unit in its last place: twice a rounding, as exp and tanh are not correctly
  rounded.
- A sum of n terms in some order rounds after each of its additions. Half way through it holds half of the sum S, and a
  random walk beside: over all orders the partial sums have a mean square of (2 S^2 + Q) / 6, where Q is the sum of the
  squared terms. The n errors are independent: the sum is off by sqrt(n (2 S^2 + Q) / 6) units.
- The operands of a matrix product are rounded to the dtype under test; sums are in float32 at least.
"""

import hashlib
import inspect
import math
from collections.abc import Callable
from dataclasses import is_dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

SAMPLES = 6

_ELEMENTWISE = {
    *("add", "sub", "rsub", "mul", "div", "addcmul", "addcdiv", "lerp", "pow", "sqrt", "rsqrt", "reciprocal"),
    *("exp", "exp2", "log", "log2", "logaddexp", "cos", "sin", "tanh", "sigmoid", "silu", "gelu", "cumsum"),
    *("tanh_backward", "sigmoid_backward", "silu_backward", "gelu_backward", "embedding_dense_backward"),
    "nll_loss_forward",
}
_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot"}


def _shifted_exp(x: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    top = x.amax(dim, keepdim=True)
    top = top.masked_fill(top == float("-inf"), 0.0)
    weights = (x - top).exp()
    return top, weights, weights.sum(dim, keepdim=True)


def _softmax(x: Tensor, dim: int, *_) -> Tensor:
    _, weights, total = _shifted_exp(x, dim)
    return weights / total


def _safe_softmax(x: Tensor, dim: int, *_) -> Tensor:
    return _softmax(x, dim).nan_to_num(0.0)  # rows of -inf


def _log_softmax(x: Tensor, dim: int, *_) -> Tensor:
    top, _, total = _shifted_exp(x, dim)
    return x - top - total.log()


def _logsumexp(x: Tensor, dim: list[int], keepdim: bool = False) -> Tensor:
    (dim,) = dim
    top, _, total = _shifted_exp(x, dim)
    lse = top + total.log()
    return lse if keepdim else lse.squeeze(dim)


def _softmax_backward(gradient: Tensor, p: Tensor, dim: int, *_) -> Tensor:
    return p * (gradient - (gradient * p).sum(dim, keepdim=True))


def _log_softmax_backward(gradient: Tensor, log_p: Tensor, dim: int, *_) -> Tensor:
    return gradient - log_p.exp() * gradient.sum(dim, keepdim=True)


_WRITTEN_OUT: dict[str, Callable[..., Tensor]] = {
    "_softmax": _softmax,
    "_safe_softmax": _safe_softmax,
    "_log_softmax": _log_softmax,
    "logsumexp": _logsumexp,
    "_softmax_backward_data": _softmax_backward,
    "_log_softmax_backward_data": _log_softmax_backward,
}


class _Rounding(TorchDispatchMode):
    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        self.dtype = dtype
        self.eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        self.random = torch.Generator().manual_seed(seed)

    def error(self, x: Tensor) -> Tensor:
        """Uniform in (-eps, eps), one for each number of ``x``."""
        return torch.rand(x.shape, dtype=torch.float64, generator=self.random).mul_(2).sub_(1).mul_(self.eps)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operation.overloadpacket.__name__
        if name in _WRITTEN_OUT:
            with self:
                return _WRITTEN_OUT[name](*args, **kwargs)
        if name in _PRODUCTS:
            *bias, a, b = args
            a, b = (x.to(self.dtype).to(x.dtype) for x in (a, b))
            out, squares = operation(*bias, a, b, **kwargs), torch.matmul(a * a, b * b)
            return self.off_by_a_sum(out, out, squares, a.shape[-1])
        out = operation(*args, **kwargs)
        if name in ("sum", "mean") and out.is_floating_point():
            count = args[0].numel() // max(out.numel(), 1)
            squares = operation(args[0] * args[0], *args[1:], **kwargs)
            if name == "mean":
                return self.off_by_a_sum(out, out, squares / max(count, 1), count)
            return self.off_by_a_sum(out, out, squares, count)
        if name.rstrip("_") in _ELEMENTWISE:
            first = out[0] if isinstance(out, tuple) else out
            if first.is_floating_point():
                first.mul_(1 + self.error(first))
        return out

    def off_by_a_sum(self, out: Tensor, total: Tensor, squares: Tensor, count: int) -> Tensor:
        size = ((2 * total * total + squares) * (count / 6)).sqrt()
        return out + self.error(out) * size


_KEPT = 256 << 20  # bytes of results
_known: dict[bytes, list[Tensor | None]] = {}


def _key(function: Callable, *given: object) -> bytes | None:
    """What decides the result of a function that reads nothing but its arguments; None where more may decide it."""
    if getattr(function, "__closure__", None) is not None or not inspect.isfunction(function):
        return None
    digest = hashlib.blake2b(f"{function.__module__}.{function.__qualname__}".encode())
    given = given, function.__defaults__, function.__kwdefaults__
    for leaf in tree_leaves(tree_map_only(is_dataclass, lambda x: list(vars(x).values()), given, is_leaf=is_dataclass)):
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype}{leaf.shape}".encode())
            whole = leaf.detach().cpu().clone(memory_format=torch.contiguous_format)  # of one number also its strides
            digest.update(whole.flatten().view(torch.uint8).numpy())
        elif leaf is None or isinstance(leaf, (int, float, str, torch.dtype)):
            digest.update(repr(leaf).encode())
        else:
            return None
    return digest.digest()


def rounded(dtype: torch.dtype, function: Callable, *args, **kwargs):
    """What ``function`` may give in ``dtype``: its results, each with :data:`SAMPLES` runs stacked in front.

    Floating-point arguments become float64; gradients taken within ``function`` are rounded as well. The results are
    kept: a test has the same arguments for each backend.
    """
    key = _key(function, dtype, args, tuple(kwargs.items()))
    if key in _known:
        _known[key] = _known.pop(key)  # the last to go
        return _known[key]

    def wide(x: Tensor) -> Tensor:
        return x.detach().cpu().double() if x.is_floating_point() else x.cpu()

    args, kwargs = tree_map_only(Tensor, wide, (args, kwargs))
    runs = []
    for seed in range(SAMPLES):
        with _Rounding(dtype, seed):
            runs.append(function(*args, **kwargs))
    result = tree_map(lambda *samples: None if samples[0] is None else torch.stack(samples).detach(), *runs)
    if key is not None:
        _known[key] = result
        while sum(x.nbytes for x in tree_leaves(_known) if x is not None) > _KEPT:
            del _known[next(iter(_known))]
    return result


LEVELS = (2.0**13, 2.0**17, 1e4, 1e5)


def error_of_half(level: float) -> float:
    """How far the weight of a key may lie from 1/2, relatively, if a sink has the very same large score.

    Kernels multiply scores by log2(e) and take exp2 of differences. A compiler may join one of the two products with
    the subtraction (fma): that one is not rounded, the other is, by at most 2^-24 of itself. Then the difference of the
    two is up to level * 2^-24 in place of 0, and the weight 1 / (1 + exp(difference)). A product with a power of two is
    exact: nothing is lost then, joined or not.
    """
    exact = math.frexp(level)[0] == 0.5
    return 1e-6 + (0.0 if exact else level * 2.0**-24 / 2)
