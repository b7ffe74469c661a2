"""The attention module: projections, rotary embedding and the operators, for training and for a paged cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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

__all__ = ["Attention", "Replacement", "Swap", "replace"]


class Attention(nn.Module):
    """Multi-head attention without the matrix of scores: grouped heads, rotary embedding, window, softcap, sinks.

    Args:
        hidden_size: of the input and of the output.
        num_heads, num_kv_heads: query heads, and the heads of keys and values that they share (None: as many).
        head_dim: None for ``hidden_size // num_heads``.
        bias, out_bias: of the query, key and value projections, and of the output projection (None: as ``bias``).
        causal: a token sees no later one.
        window: how many tokens a query sees, the latest and its own included (without ``causal`` as many behind it);
            None for all.
        softcap: c > 0 caps the scores at c, see :func:`kvops.flash_attention`.
        scale: of the scores, None for ``head_dim ** -0.5``.
        sinks: learn a logit for each head that joins the softmax's denominator, 0 at first.
        rope: base of the rotary embedding's frequencies, or the frequencies themselves, float32 ``[head_dim / 2]``
            (dimension i is paired with i + head_dim / 2); None for no rotary embedding.
        qk_norm_eps: normalise queries and keys head by head before the rotary embedding (RMSNorm); None for no.
        layer: which layer of a cache is this module's.
        policy: what judges the keys of prompts in a cache, for :meth:`kvops.PagedKVCache.evict`.
        device, dtype: of the parameters.

    The parameters have the names that Hugging Face's models use: ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``,
    ``q_norm``, ``k_norm``, ``sinks``.
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
        if policy is not None:
            from kvops.policies import Policy

            if not isinstance(policy, Policy):
                raise TypeError(f"policy: expected a kvops.policies.Policy, such as SnapKV(), got {policy!r}")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim
        self.causal, self.window, self.softcap, self.scale = causal, window, softcap, scale
        self.layer, self.policy = layer, policy
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
        self.register_buffer("rope", None if rope is None else _frequencies(rope, self.head_dim, device), False)

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention, *, causal: bool = False) -> Attention:
        """A copy of ``module``'s projections; inputs are ``[batch, seqlen, hidden]`` whatever its ``batch_first``.

        Raises ValueError for dropout, ``add_bias_kv``, ``add_zero_attn`` and keys or values of another width.
        """
        if not isinstance(module, nn.MultiheadAttention):
            raise TypeError(f"module: expected a torch.nn.MultiheadAttention, got {type(module).__name__}")
        if module.dropout:
            raise ValueError(f"module: expected dropout=0, got {module.dropout}: kvops has no dropout")
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
    def from_transformers(cls, layer: nn.Module, *, rope: Tensor | None = None) -> Attention:
        """An attention layer of a transformers model, taken over with the projections that it has (nothing is copied).

        Args:
            layer: of Llama, Mistral, Qwen2, Qwen3, Gemma, Gemma2, Gemma3 or GPT-OSS.
            rope: frequencies, float32 ``[head_dim / 2]``: the ``inv_freq`` of the model's rotary embedding. None: by
                the config's ``rope_theta``, where the config says no more than that.

        Raises ValueError for another layer, or a rotary embedding that only the model knows. :func:`replace` swaps the
        layers of a whole model.
        """
        from kvops.integrations.transformers.config import rope_of
        from kvops.integrations.transformers.layers import options_of

        options = options_of(layer)
        if rope is None:
            rope = rope_of(layer.config)
            if rope is None:
                raise ValueError(
                    "rope: expected the frequencies, as the config's rotary embedding is not the plain one: pass the "
                    "model's rotary_emb.inv_freq"
                )
        attention = cls._around(layer, **options)
        attention.rope = _frequencies(rope, attention.head_dim, attention.q_proj.weight.device)
        return attention

    @classmethod
    def _around(cls, source: Any, **options: Any) -> Any:
        """An instance that has ``source``'s own projections, norms and sinks, and no rotary embedding."""
        attention = cls(device="meta", **options)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(attention, name, getattr(source, name))
        for name in ("q_norm", "k_norm", "sinks"):
            setattr(attention, name, getattr(source, name, None))
        return attention.train(source.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Attention:
        """Moves, casts or empties what the module has, apart from the frequencies, which only move. In bfloat16 they
        would turn a token at position 1000 by up to two radians too much or too little; no state dict brings them."""
        rope = self.rope
        super()._apply(fn, recurse)
        if rope is not None and self.rope is not None:
            self.rope = rope if self.rope.is_meta else rope.to(self.rope.device)
        return self

    def project(
        self, x: Tensor, context: Tensor, cos: Tensor | None, sin: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of x ``[..., hidden]``, keys and values of ``context``: each ``[..., heads, head_dim]``.

        Queries and keys are normalised, and turned where ``cos`` and ``sin`` ``[..., head_dim / 2]`` are given.
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
    ) -> Tensor:
        """Attend, in one of three ways.

        Args:
            x: dense ``[B, S, hidden]``; packed ``[T, hidden]`` with ``cu_seqlens`` int32 ``[sequences + 1]`` and
                ``max_seqlen``; with a ``cache``, the next tokens ``[B', T, hidden]`` of its ``rows``.
            positions: int ``[B, S]`` (or ``[S]``, the same for all rows) or ``[T]`` for the rotary embedding; None
                counts from 0 in each sequence. With a cache they are what :meth:`kvops.PagedKVCache.extend` returned,
                once for all layers.
            context: ``[B, Sk, hidden]`` that keys and values come from (cross-attention, without rotary embedding).
            q_lens: with a cache: int32 ``[B']``, how many of a row's tokens are real, where not all are.
            prefill: with a cache: x are whole prompts of one length for empty ``rows``. They are read by dense
                attention, and scored by the policy. Otherwise tokens attend to what the cache kept and add to its
                scores as the policy says.

        Returns x's shape. There are no gradients through a cache.

        Raises ValueError for arguments that do not go together, and, on the CPU and with ``KVOPS_DEBUG=1``, for
        ``prefill`` of rows that are not empty.
        """
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
        q, k, v = self.project(x, x if context is None else context, *self._turns(positions))
        options = self._options() | {"causal": self.causal}
        if not self.causal:
            options["window_right"] = options["window_left"]
        if cu_seqlens is not None and max_seqlen is not None:
            out, _ = flash_attention_varlen(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)
        else:
            out, _ = flash_attention(q, k, v, **options)
        return self.o_proj(out.flatten(-2))

    def _options(self) -> dict[str, Any]:
        window_left = -1 if self.window is None else self.window - 1
        return {"window_left": window_left, "softcap": self.softcap, "scale": self.scale, "sinks": self.sinks}

    def _turns(self, positions: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
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
        if positions is None:
            raise ValueError("positions: expected what cache.extend() returned for these tokens, got None")
        checks.expect_rank("x", x, "[rows, tokens, hidden]")
        q, k, v = self.project(x, x, *self._turns(positions))
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
        sinks = "" if self.sinks is None else ", sinks=True"
        heads = f"{self.num_heads} heads of {self.head_dim} over {self.num_kv_heads}"
        return f"{heads}, causal={self.causal}{window}{softcap}{sinks}"


def _frequencies(rope: float | Tensor, head_dim: int, device: torch.device | str | None) -> Tensor:
    if head_dim % 2:
        raise ValueError(f"head_dim: expected an even size for the rotary embedding, got {head_dim}")
    if not isinstance(rope, Tensor):
        if not 0 < rope < float("inf"):
            raise ValueError(f"rope: expected a finite base above 0, or the frequencies, got {rope}")
        rope = rope ** -(torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
        device = device or torch.get_default_device()
    checks.expect_shape("rope", rope, "[head_dim / 2]", head_dim // 2)
    if device is not None and torch.device(device).type != "meta":  # what is there cannot be had back
        rope = rope.to(device)
    return rope.to(torch.float32)


@dataclass(frozen=True)
class Swap:
    """What became of the attention layer ``name`` of class ``kind``: swapped, or left as it was for a ``reason``."""

    name: str
    kind: str
    reason: str = ""

    @property
    def swapped(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class Replacement:
    """What :func:`replace` did, layer by layer; ``str()`` reads like a report."""

    layers: tuple[Swap, ...]

    @property
    def swapped(self) -> int:
        return sum(layer.swapped for layer in self.layers)

    def __str__(self) -> str:
        lines = [f"{self.swapped} of {len(self.layers)} attention layers run on kvops.nn.Attention"]
        lines += [f"  left: {layer.name} ({layer.kind}): {layer.reason}" for layer in self.layers if not layer.swapped]
        return "\n".join(lines)


def replace(model: nn.Module) -> Replacement:
    """Put :class:`Attention` in the place of a loaded transformers model's attention layers, in place.

    The layers keep their own projections, so that nothing is copied and the state dict keeps its names; the model's
    masks become those of ``attn_implementation="kvops"``. Print what comes back.

    Raises ValueError for what is no transformers model, and as
    :func:`kvops.integrations.transformers.enable`.
    """
    from kvops.integrations.transformers.layers import replace_layers

    return replace_layers(model)
