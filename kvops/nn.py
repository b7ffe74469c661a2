"""An attention module: projections, rotary embedding and kvops' operators, for training and over a paged cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kvops import checks
from kvops.cache import PagedKVCache, Rows
from kvops.ops.attention import flash_attention
from kvops.ops.varlen import flash_attention_varlen
from kvops.rotary import rotate

if TYPE_CHECKING:
    from kvops.policies import Policy

__all__ = ["Attention"]


class Attention(nn.Module):
    """Multi-head attention that never materialises the scores, with grouped heads, rotary embedding and windows.

    Args:
        hidden_size: the size of inputs and outputs.
        num_heads: the number of query heads.
        num_kv_heads: the number of key and value heads, a divisor of ``num_heads``. None means ``num_heads``.
        head_dim: the size of a head. None means ``hidden_size // num_heads``.
        bias: whether the query, key and value projections have a bias.
        out_bias: whether the output projection has one. None means ``bias``.
        causal: whether a token attends only to itself and to earlier tokens.
        window: the number of tokens a query attends to, counting itself: earlier ones, and without ``causal`` as many
            later ones. None means all.
        softcap: a value c > 0 caps the scores at c, see :func:`kvops.flash_attention`. 0 caps nothing.
        scale: the factor of the scores. None means ``head_dim ** -0.5``.
        dropout: the share of attention's probabilities that is dropped in training mode.
        sinks: whether each head learns a logit that joins the denominator of the softmax. They start at 0.
        rope: the base of the rotary embedding, or its frequencies, float32 ``[head_dim / 2]``. Dimension i is paired
            with i + head_dim / 2. None means no rotary embedding.
        qk_norm_eps: the epsilon of an RMSNorm over each head of queries and keys before the rotary embedding. None
            means no norm.
        layer: the layer of a cache that this module uses.
        policy: scores the keys of prompts in a cache, for :meth:`kvops.PagedKVCache.evict`.
        device, dtype: the parameters' device and dtype.

    The parameters have the names of Hugging Face models: ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``, ``q_norm``,
    ``k_norm``, ``sinks``.

    Raises:
        ValueError: sizes that do not fit together.
        TypeError: a size that is not an int, or a policy that is not a :class:`kvops.policies.Policy`.
    """

    rope: Tensor | None
    sinks: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        out_bias: bool | None = None,
        causal: bool = True,
        window: int | None = None,
        softcap: float = 0.0,
        scale: float | None = None,
        dropout: float = 0.0,
        sinks: bool = False,
        rope: float | Tensor | None = None,
        qk_norm_eps: float | None = None,
        layer: int = 0,
        policy: Policy | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for name, value, least in (
            ("hidden_size", hidden_size, 1),
            ("num_heads", num_heads, 1),
            ("num_kv_heads", num_kv_heads, 1),
            ("head_dim", 1 if head_dim is None else head_dim, 1),
            ("window", 1 if window is None else window, 1),
            ("layer", layer, 0),
        ):
            checks.expect_int(name, value, least)
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of num_heads {num_heads}, got {num_kv_heads}")
        if head_dim is None and hidden_size % num_heads:
            raise ValueError(f"hidden_size: expected a multiple of num_heads {num_heads}, got {hidden_size}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a probability from 0 to below 1, got {dropout}")
        if policy is not None:
            from kvops.policies import Policy

            if not isinstance(policy, Policy):
                raise TypeError(f"policy: expected a kvops.policies.Policy, such as SnapKV(), got {policy!r}")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim
        self.causal, self.window, self.softcap, self.scale = causal, window, softcap, scale
        self.dropout, self.layer, self.policy = dropout, layer, policy
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = num_heads * self.head_dim
        self.q_proj = nn.Linear(hidden_size, inner, bias=bias, **place)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=bias, **place)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=bias, **place)
        self.o_proj = nn.Linear(inner, hidden_size, bias=bias if out_bias is None else out_bias, **place)
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        if qk_norm_eps is not None:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=qk_norm_eps, **place)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=qk_norm_eps, **place)
        self.register_parameter("sinks", nn.Parameter(torch.zeros(num_heads, **place)) if sinks else None)
        self.register_buffer("rope", None if rope is None else frequencies(rope, self.head_dim, device), False)

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention, *, causal: bool = False) -> Attention:
        """A module with a copy of ``module``'s projections.

        Inputs are ``[batch, seqlen, hidden]``, whatever ``module.batch_first`` is.

        Raises:
            ValueError: ``module`` has ``add_bias_kv``, ``add_zero_attn``, or keys or values of another width.
            TypeError: ``module`` is not a :class:`torch.nn.MultiheadAttention`.
        """
        if not isinstance(module, nn.MultiheadAttention):
            raise TypeError(f"module: expected a torch.nn.MultiheadAttention, got {type(module).__name__}")
        if module.bias_k is not None or module.add_zero_attn:
            raise ValueError("module: expected add_bias_kv and add_zero_attn off, got one of them on")
        if module.in_proj_weight is None:
            raise ValueError(
                f"module: expected keys and values of width {module.embed_dim} as the queries, "
                f"got kdim {module.kdim} and vdim {module.vdim}"
            )
        weight = module.in_proj_weight
        attention = cls(
            module.embed_dim,
            module.num_heads,
            bias=module.in_proj_bias is not None,
            causal=causal,
            dropout=module.dropout,
            device=weight.device,
            dtype=weight.dtype,
        )
        with torch.no_grad():
            for place, projection in enumerate((attention.q_proj, attention.k_proj, attention.v_proj)):
                projection.weight.copy_(weight.chunk(3)[place])
                if module.in_proj_bias is not None:
                    projection.bias.copy_(module.in_proj_bias.chunk(3)[place])
        attention.o_proj.load_state_dict(module.out_proj.state_dict())
        return attention.train(module.training)

    @classmethod
    def around(cls, source: Any, **options: Any) -> Any:
        """An instance that shares ``source``'s projections, norms and sinks and has no rotary embedding."""
        attention = cls(device="meta", **options)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(attention, name, getattr(source, name))
        for name in ("q_norm", "k_norm", "sinks"):
            setattr(attention, name, getattr(source, name, None))
        return attention.train(source.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Attention:
        """Move, cast or empty the module. The frequencies of the rotary embedding only move: in bfloat16, the angle of
        position 1000 would be up to two radians off, and no state dict restores them."""
        rope = self.rope
        super()._apply(fn, recurse)
        if rope is not None and self.rope is not None:
            self.rope = rope if self.rope.is_meta else rope.to(self.rope.device)
        return self

    def project(
        self, x: Tensor, context: Tensor, cos: Tensor | None, sin: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of x ``[..., hidden]``, keys and values of ``context``: each ``[..., heads, head_dim]``.

        Queries and keys are normalised if the module has norms, and rotated if ``cos`` and ``sin``
        ``[..., head_dim / 2]`` are given.
        """
        q, k, v = (
            projection(source).unflatten(-1, (-1, self.head_dim))
            for projection, source in ((self.q_proj, x), (self.k_proj, context), (self.v_proj, context))
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if cos is not None and sin is not None:
            cos, sin = cos.unsqueeze(-2).to(q.dtype), sin.unsqueeze(-2).to(q.dtype)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return q, k, v

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        *,
        context: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cache: PagedKVCache | None = None,
        rows: Rows = slice(None),
        q_lens: Tensor | None = None,
        prefill: bool = False,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Attention over dense inputs, over packed inputs, or over a cache.

        Args:
            x: ``[B, S, hidden]``; packed ``[T, hidden]`` with ``cu_seqlens``; with a ``cache``, the next tokens
                ``[B', T, hidden]`` of its ``rows``.
            positions: int ``[B, S]``, ``[S]`` or ``[T]``, for the rotary embedding. None counts from 0 in each
                sequence. With a cache, what :meth:`kvops.PagedKVCache.extend` returned; all layers share it.
            context: ``[B, Sk, hidden]``, the source of keys and values in cross-attention. The module has no rotary
                embedding then.
            cu_seqlens: int32 ``[sequences + 1]``, where packed sequences begin and end.
            max_seqlen: the length of the longest packed sequence.
            cache: the cache that keys and values are appended to and read from. There is no gradient.
            rows: the rows of the cache.
            q_lens: int32 ``[B']``, the number of real tokens of each row of a cache. None means all.
            prefill: with a cache, whether x are whole prompts of one length for empty rows. Prompts are read by dense
                attention and scored by the policy. Other tokens attend to what is in the cache and add to its scores
                as the policy says.
            bias: without a cache: a bool mask (True: may attend) or a float bias that broadcasts to
                ``[B, heads, S, Sk]``, or to ``[heads, T, max_seqlen]`` beside packed inputs, as
                :func:`kvops.flash_attention` and :func:`kvops.flash_attention_varlen` take it.

        Returns:
            A tensor of x's shape.

        Raises:
            ValueError: arguments that do not fit together; a cache in training mode with dropout; on the CPU and with
                ``KVOPS_DEBUG=1`` also ``prefill`` of rows that are not empty.
        """
        if bias is not None and cache is not None:
            raise ValueError("bias: expected None along with a cache, got a tensor")
        if cache is not None:
            return self._cached(x, positions, cache, rows, q_lens, prefill, context)
        if prefill or q_lens is not None:
            raise ValueError("cache: expected a PagedKVCache along with prefill or q_lens, got None")
        if (cu_seqlens is None) != (max_seqlen is None) or (cu_seqlens is not None and context is not None):
            raise ValueError("cu_seqlens: expected together with max_seqlen and without context")
        if cu_seqlens is None:
            checks.expect_rank("x", x, "[batch, seqlen, hidden]")
        else:
            checks.expect_rank("x", x, "[tokens, hidden]")
        if self.rope is not None and context is not None:
            raise ValueError("context: expected None in a module with rotary embedding, got a tensor")
        if positions is None:
            positions = torch.arange(x.shape[-2], device=x.device)
            if cu_seqlens is not None:
                sequence = torch.searchsorted(cu_seqlens, positions.int(), right=True) - 1
                positions = positions - cu_seqlens[sequence]
        elif positions.shape not in (x.shape[:-1], x.shape[-2:-1], (1, *x.shape[-2:-1])):
            raise ValueError(
                f"positions: expected one for each token of x, {list(x.shape[:-1])}, got shape {list(positions.shape)}"
            )
        q, k, v = self.project(x, x if context is None else context, *self._angles(positions))
        options = self._options() | {"causal": self.causal}
        if self.training:
            options["dropout_p"] = self.dropout
        if not self.causal:
            options["window_right"] = options["window_left"]
        if cu_seqlens is not None and max_seqlen is not None:
            lengths = cu_seqlens, cu_seqlens, max_seqlen, max_seqlen
            out, _ = flash_attention_varlen(q, k, v, *lengths, bias=bias, **options)
        else:
            out, _ = flash_attention(q, k, v, bias=bias, **options)
        return self.o_proj(out.flatten(-2))

    def _options(self) -> dict[str, Any]:
        window_left = -1 if self.window is None else self.window - 1
        return {"window_left": window_left, "softcap": self.softcap, "scale": self.scale, "sinks": self.sinks}

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
        if self.rope is None:
            return None, None
        angles = positions[..., None].float() * self.rope.to(positions.device)
        return angles.cos(), angles.sin()

    def _cached(
        self,
        x: Tensor,
        positions: Tensor | None,
        cache: PagedKVCache,
        rows: Rows,
        q_lens: Tensor | None,
        prefill: bool,
        context: Tensor | None,
    ) -> Tensor:
        if context is not None or not self.causal:
            raise ValueError("cache: expected None for attention that is not causal or has a context, got a cache")
        if self.training and self.dropout:
            raise ValueError(f"cache: expected None in training with dropout {self.dropout}, got a cache: call eval()")
        if positions is None:
            raise ValueError("positions: expected what cache.extend() returned for these tokens, got None")
        checks.expect_rank("x", x, "[rows, tokens, hidden]")
        q, k, v = self.project(x, x, *self._angles(positions))
        cache.append(self.layer, k, v, positions, q_lens=q_lens, rows=rows)
        if not prefill:
            accumulate = None if self.policy is None else self.policy.accumulate
            out = cache.attend(
                self.layer,
                q,
                q_lens=q_lens,
                rows=rows,
                query_positions=positions,
                accumulate=accumulate,
                **self._options(),
            )
            return self.o_proj(out.flatten(-2))
        if q_lens is not None:
            raise ValueError("q_lens: expected None along with prefill (prompts of one length), got a tensor")
        if checks.may_look(positions):
            checks.expect_data(
                "positions", "prompts from position 0 on (prefill is for empty rows)", positions[:, :1] == 0
            )
        out, lse = flash_attention(q, k, v, causal=True, **self._options())
        if self.policy is not None:
            from kvops.policies import Prefill

            window_left = self._options()["window_left"]
            place = self.layer, cache.num_layers
            seen = Prefill(q, k, v, lse, window_left, *place, self.rope, self.scale, self.softcap)
            cache.set_scores(self.layer, self.policy.checked_score(seen), rows=rows)
        return self.o_proj(out.flatten(-2))

    def extra_repr(self) -> str:
        window = "" if self.window is None else f", window={self.window}"
        softcap = f", softcap={self.softcap}" if self.softcap else ""
        softcap += f", dropout={self.dropout}" if self.dropout else ""
        sinks = "" if self.sinks is None else ", sinks=True"
        heads = f"{self.num_heads} heads of {self.head_dim} over {self.num_kv_heads}"
        return f"{heads}, causal={self.causal}{window}{softcap}{sinks}"


def frequencies(rope: float | Tensor, head_dim: int, device: torch.device | str | None) -> Tensor:
    """The frequencies of a rotary embedding, float32 ``[head_dim / 2]``, from its base or checked."""
    if head_dim % 2:
        raise ValueError(f"head_dim: expected an even size for the rotary embedding, got {head_dim}")
    if not isinstance(rope, Tensor):
        if not 0 < rope < float("inf"):
            raise ValueError(f"rope: expected a finite base above 0, or the frequencies, got {rope}")
        rope = rope ** -(torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
        device = device or torch.get_default_device()
    checks.expect_shape("rope", rope, "[head_dim / 2]", head_dim // 2)
    if device is not None and torch.device(device).type != "meta":  # values on the meta device are lost
        rope = rope.to(device)
    return rope.to(torch.float32)
