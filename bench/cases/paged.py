"""The ragged paged cache: decoding, drafts, scores from the same pass, appending, and the schedule of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import kvops
from bench import truth
from bench.case import (
    GEMMA,
    LLAMA_8B,
    LLAMA_70B,
    MISTRAL_7B,
    QWEN_7B,
    SMOLLM,
    STARCODER,
    Case,
    Inputs,
    Model,
    Outputs,
    Peer,
    Scale,
    UnavailableError,
)
from bench.lists import BLOCK_SIZE, gathered_slots, heavy_tailed, in_huge_pages, lengths, make_lists, sampled, slots

# The page size that flash-attn 2 requires.
_FLASH_ATTN_PAGE = 256
_WORKSPACE = 256 << 20
_CACHES = "k_cache", "v_cache"
# Lists are sequences of their own for these libraries: a mask over slots would be a tensor of another shape.
_LIBRARIES_LACK = {"reduce": "gives no scores", "scale": "has no int8 cache", "bias": "its mask was left out"}
# The number of programs of a schedule: two for each multiprocessor of an H100.
_PROGRAMS = 264
# Enough requests for a longest list of 16 times the mean.
_MANY = 32


def _queries(inputs: Inputs, batch: int, head: int) -> Tensor:
    """[T, group, D] of one list."""
    group = inputs["q"].shape[2] // inputs["seq_lens"].shape[1]
    return inputs["q"][batch, :, head * group : (head + 1) * group]


def _attend(inputs: Inputs) -> Outputs:
    cache = (inputs[name] for name in ("k_cache", "v_cache", "block_tables", "seq_lens"))
    options = {"window_left": inputs["window"], "softcap": inputs["softcap"], "bias": inputs["bias"], **_scales(inputs)}
    if inputs["reduce"]:
        options |= {"scores": inputs["scores"], "score_reduce": inputs["reduce"]}
    out, lse = kvops.paged_attention(inputs["q"], *cache, **options)
    return (out, lse, inputs["scores"]) if inputs["reduce"] else (out, lse)


def _scales(inputs: Inputs) -> dict[str, float | Tensor]:
    """The scales of an int8 cache: one for all, or one for each slot."""
    kind = "scale" if isinstance(inputs["scale"], float) else "slot_scale"
    return {} if inputs["scale"] is None else {f"{side}_{kind}": inputs["scale"] for side in "kv"}


def _given(option: object) -> bool:
    return isinstance(option, Tensor) or bool(option)


def _refuse(inputs: Inputs, **lacks: str) -> None:
    """Raise UnavailableError where an option is given that a peer lacks."""
    for name, reason in lacks.items():
        if _given(inputs[name]):
            raise UnavailableError(reason)


def _wide(inputs: Inputs, name: str, places: Tensor) -> Tensor:
    """The slots at ``places`` of a cache, those of 8 bits in the dtype of the queries."""
    slots, scale = inputs[name].flatten(0, 1)[places], inputs["scale"]
    if scale is None:
        return slots
    return slots.to(inputs["q"].dtype) * (scale if isinstance(scale, float) else scale.flatten()[places][..., None])


def _sample(inputs: Inputs, outputs: Outputs) -> Outputs:
    """out [lists, T, group, D], lse [lists, group, T] and the scores of those lists, one behind another."""
    group = inputs["q"].shape[2] // inputs["seq_lens"].shape[1]
    places = sampled(inputs)
    out, lse, scores = (*outputs, None, None)[:3]
    return (
        None if out is None else torch.stack([out[b, :, h * group : (h + 1) * group] for b, h in places]),
        None if lse is None else torch.stack([lse[b, h * group : (h + 1) * group] for b, h in places]),
        None if scores is None else torch.cat([scores.flatten()[slots(inputs, b, h)] for b, h in places]),
    )


def _truth(inputs: Inputs, dtype: torch.dtype) -> Outputs:
    parts = []
    for b, h in sampled(inputs):
        where = slots(inputs, b, h)
        k, v = (_wide(inputs, name, where) for name in _CACHES)
        options = {"causal": True, "window": inputs["window"], "softcap": inputs["softcap"]}
        if inputs["bias"] is not None:
            shown = inputs["bias"][b, :, :, : len(k)].expand(
                inputs["q"].shape[2] // inputs["seq_lens"].shape[1], -1, -1
            )
            options["bias"] = torch.zeros(shown.shape, device=k.device).masked_fill(~shown, -math.inf)
        score_from = 0 if inputs["reduce"] else None
        part = truth.attention(_queries(inputs, b, h), k, v, dtype, score_from=score_from, **options)
        parts.append(part | {"scores": inputs["scores"].flatten()[where] + part["scores"]})
    out, lse = (torch.stack([part[name] for part in parts]) for name in ("out", "lse"))
    return (out, lse, torch.cat([part["scores"] for part in parts])) if inputs["reduce"] else (out, lse)


def _seen(inputs: Inputs, length: int) -> Tensor:
    """bool [B, Hkv, T, length]: which slots each query sees."""
    lens, T = inputs["seq_lens"][..., None, None], inputs["q"].shape[1]
    query = lens - T + torch.arange(T, device=lens.device)[:, None]
    slot = torch.arange(length, device=lens.device)
    mask = slot <= query
    if inputs["bias"] is not None:
        mask = mask & inputs["bias"][..., :length]
    return mask & (slot >= query - inputs["window"]) if inputs["window"] >= 0 else mask


def _gathered(inputs: Inputs) -> Callable[[], Outputs]:
    """The usual way without a paged kernel: gather the lists, pad them, and attend."""
    Hq, D = inputs["q"].shape[2:]
    Hkv = inputs["seq_lens"].shape[1]
    softcap = inputs["softcap"]

    def call() -> Outputs:
        places, _ = gathered_slots(inputs)
        k, v = (_wide(inputs, name, places) for name in _CACHES)
        seen = _seen(inputs, places.shape[2])
        q = inputs["q"].transpose(1, 2).unflatten(1, (Hkv, -1))  # [B, Hkv, group, T, D]
        if not softcap and not inputs["reduce"]:
            mask = seen[:, :, None].expand(-1, -1, Hq // Hkv, -1, -1).flatten(1, 2)
            out = F.scaled_dot_product_attention(q.flatten(1, 2), k, v, mask, enable_gqa=True)
            return (out.transpose(1, 2),)
        s = q @ k[:, :, None].mT * D**-0.5
        s = softcap * torch.tanh(s / softcap) if softcap else s
        p = s.masked_fill(~seen[:, :, None], float("-inf")).float().softmax(-1)
        out = (p.to(v.dtype) @ v[:, :, None]).flatten(1, 2).transpose(1, 2)
        if not inputs["reduce"]:
            return (out,)
        inputs["scores"].flatten().index_add_(0, places[seen.any(2)], p.sum((2, 3))[seen.any(2)])
        return out, None, inputs["scores"]

    return call


def _contiguous(inputs: Inputs) -> Callable[[], Outputs]:
    """SDPA over a contiguous cache, which shows the cost of paging. Gathered outside the timing."""
    _refuse(inputs, reduce="gives no scores", softcap="has no softcap", scale="has no 8-bit cache")
    places, _ = gathered_slots(inputs)
    k, v = (in_huge_pages(inputs[name].flatten(0, 1)[places]) for name in ("k_cache", "v_cache"))
    group = inputs["q"].shape[2] // k.shape[1]
    mask = _seen(inputs, places.shape[2]).repeat_interleave(group, 1)
    everything = bool(mask.all())

    def call() -> Outputs:
        q = inputs["q"].transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, None if everything else mask, enable_gqa=True)
        return (out.transpose(1, 2),)

    return call


def _one_head_each(inputs: Inputs) -> Tensor:
    """[B * Hkv, T, group, D]: every list is a separate sequence with one KV head, so that other libraries can run
    it."""
    Hkv = inputs["seq_lens"].shape[1]
    return inputs["q"].unflatten(2, (Hkv, -1)).transpose(1, 2).flatten(0, 1).contiguous()


def _back(out: Tensor, batch: int) -> Tensor:
    """[B * Hkv, T, group, D] -> [B, T, Hq, D]"""
    return out.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)


def _flashinfer(inputs: Inputs) -> Callable[[], Outputs]:
    import flashinfer

    _refuse(inputs, **_LIBRARIES_LACK)
    q = _one_head_each(inputs)
    lists, T, group, D = q.shape
    lens = inputs["seq_lens"].flatten()
    used = (lens + BLOCK_SIZE - 1) // BLOCK_SIZE
    indptr = F.pad(used.cumsum(0), (1, 0)).int()
    tables = inputs["block_tables"].flatten(0, 1)
    indices = tables[torch.arange(tables.shape[1], device=q.device) < used[:, None]]
    last = lens - (used - 1) * BLOCK_SIZE
    options = {"window_left": inputs["window"], "logits_soft_cap": inputs["softcap"] or None, "q_data_type": q.dtype}
    workspace = torch.empty(_WORKSPACE, dtype=torch.uint8, device=q.device)
    cache = inputs["k_cache"][:, :, None], inputs["v_cache"][:, :, None]
    if T == 1:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=group >= 4)
        wrapper.plan(indptr, indices, last, group, 1, D, BLOCK_SIZE, **options)
    else:
        starts = torch.arange(lists + 1, dtype=torch.int32, device=q.device) * T
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        wrapper.plan(starts, indptr, indices, last, group, 1, D, BLOCK_SIZE, causal=True, **options)
    return lambda: (_back(wrapper.run(q.flatten(0, 1), cache).view(q.shape), inputs["q"].shape[0]),)


def _flash_attn(inputs: Inputs) -> Callable[[], Outputs]:
    """The same lists in pages of its own size, copied outside the timing."""
    from flash_attn import flash_attn_with_kvcache

    _refuse(inputs, **_LIBRARIES_LACK)
    q = _one_head_each(inputs)
    places, filled = gathered_slots(inputs)
    pages = -(-places.shape[2] // _FLASH_ATTN_PAGE)
    padding = pages * _FLASH_ATTN_PAGE - places.shape[2]
    k, v = (
        F.pad(inputs[name].flatten(0, 1)[places] * filled[..., None], (0, 0, 0, padding))
        .reshape(-1, _FLASH_ATTN_PAGE, 1, q.shape[3])
        .contiguous()
        for name in ("k_cache", "v_cache")
    )
    table = torch.arange(len(q) * pages, dtype=torch.int32, device=q.device).view(len(q), pages)
    options = {"causal": True, "window_size": (inputs["window"], -1), "softcap": inputs["softcap"]}
    lens = inputs["seq_lens"].flatten()
    return lambda: (
        _back(flash_attn_with_kvcache(q, k, v, cache_seqlens=lens, block_table=table, **options), inputs["q"].shape[0]),
    )


def attention(
    model: Model,
    batch: int,
    context: int,
    *,
    tokens: int = 1,
    spread: str = "ragged",
    reduce: str = "",
    cache: str = "",
    masked: bool = False,
) -> Case:
    """``tokens`` new ones per sequence over "equal" lists of ``context``, "ragged" ones of up to it or "heavy-tailed"
    ones of it in the mean; ``reduce``: scores out of the same pass; ``cache``: "int8" with one scale, or "int8, slot
    scales" with one for each slot; ``masked``: a mask over the slots hides a quarter of them."""
    if spread == "heavy-tailed":
        lens = heavy_tailed(batch, model.kv_heads, context).clamp(min=tokens)
    else:
        lens = lengths(batch, model.kv_heads, context, ragged=spread == "ragged")
    seen, slots_read = 0, 0
    for length in lens.flatten().tolist():
        seen += truth.pairs(tokens, length, True, model.window)
        slots_read += length if model.window < 0 else min(length, model.window + tokens)
    rows, D = batch * tokens * model.heads, model.head_dim

    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        inputs = make_lists(lens, D, device, dtype, generator)
        q = torch.randn(batch, tokens, model.heads, D, device=device, generator=generator).to(dtype)
        options = {"window": model.window, "softcap": model.softcap, "reduce": reduce, "scale": None, "bias": None}
        if cache:
            size = torch.rand(inputs["k_cache"].shape[:2], device=device, generator=generator) / 16 + 1 / 32
            options["scale"] = size if "slot" in cache else 1 / 32
            divisor = size[..., None] if "slot" in cache else 1 / 32
            inputs |= {name: (inputs[name] / divisor).round().clamp(-127, 127).to(torch.int8) for name in _CACHES}
        if masked:
            shown = (
                torch.rand(
                    batch, 1, tokens, inputs["block_tables"].shape[2] * BLOCK_SIZE, device=device, generator=generator
                )
                < 0.75
            )
            options["bias"] = shown
        return inputs | {"q": q, "old_scores": inputs["scores"].clone()} | options

    shape: dict[str, int | str] = {"batch": batch, "context": context, "lengths": spread}
    shape |= {"tokens": tokens} if tokens > 1 else {}
    shape |= {"window": model.window} if model.window >= 0 else {}
    shape |= {"cache": cache} if cache else {}
    shape |= {"bias": "masked slots"} if masked else {}
    return Case(
        op="paged_attention",
        model=model.name,
        shape=shape | ({"scores": f"scores by {reduce}"} if reduce else {}),
        make_inputs=make,
        run=_attend,
        oracle=_truth,
        sample=_sample,
        reset=(lambda inputs: inputs["scores"].copy_(inputs["old_scores"])) if reduce else None,
        flops=4 * seen * model.group * D,
        bytes=lambda size: (
            2 * (slots_read * (1 if cache else size) + rows * size) * D
            + 4 * rows
            + (8 * slots_read if reduce or "slot" in cache else 0)
            + (batch * tokens * int(lens.max()) if masked else 0)
        ),
        peers=(
            Peer("gather + SDPA", _gathered),
            Peer("SDPA, contiguous cache", _contiguous),
            Peer("flash-attn 2", _flash_attn, "flash-attn"),
            Peer("FlashInfer", _flashinfer, "flashinfer-python"),
        ),
    )


def _written(inputs: Inputs) -> Tensor:
    """int64 [B, T, Hkv]: where the new tokens go in the flattened pool."""
    lens, T = inputs["seq_lens"].long(), inputs["k"].shape[1]
    slot = lens[..., None] - T + torch.arange(T, device=lens.device)  # [B, Hkv, T]
    block = inputs["block_tables"].gather(2, slot // BLOCK_SIZE).long()
    return (block * BLOCK_SIZE + slot % BLOCK_SIZE).transpose(1, 2)


def _append(inputs: Inputs) -> Outputs:
    kvops.paged_append(*(inputs[name] for name in ("k", "v", "k_cache", "v_cache", "block_tables", "seq_lens")))
    return inputs["k_cache"], inputs["v_cache"]


def _append_indexed(inputs: Inputs) -> Callable[[], Outputs]:
    """Without checks; every list must have room for the tokens."""

    def call() -> Outputs:
        places = _written(inputs)
        for new, cache in (("k", "k_cache"), ("v", "v_cache")):
            inputs[cache].flatten(0, 1)[places] = inputs[new]
        return inputs["k_cache"], inputs["v_cache"]

    return call


def _append_flashinfer(inputs: Inputs) -> Callable[[], Outputs]:
    import flashinfer

    B, T, Hkv, D = inputs["k"].shape
    lens = inputs["seq_lens"].flatten()
    used = (lens + BLOCK_SIZE - 1) // BLOCK_SIZE
    tables = inputs["block_tables"].flatten(0, 1)
    indices = tables[torch.arange(tables.shape[1], device=lens.device) < used[:, None]]
    indptr = F.pad(used.cumsum(0), (1, 0)).int()
    last = lens - (used - 1) * BLOCK_SIZE
    k, v = (inputs[name].transpose(1, 2).reshape(-1, 1, D) for name in ("k", "v"))  # list by list
    member = torch.arange(B * Hkv, dtype=torch.int32, device=lens.device).repeat_interleave(T)
    position = (lens[:, None] - T + torch.arange(T, device=lens.device)).flatten().int()
    cache = inputs["k_cache"][:, :, None], inputs["v_cache"][:, :, None]

    def call() -> Outputs:
        flashinfer.append_paged_kv_cache(k, v, member, position, cache, indices, indptr, last, "NHD")
        return inputs["k_cache"], inputs["v_cache"]

    return call


def _forget(inputs: Inputs) -> None:
    """Write NaN to the slots of the new tokens, so that a missing write is noticed."""
    for name in ("k_cache", "v_cache"):
        inputs[name].flatten(0, 1).index_fill_(0, inputs["written"], float("nan"))


def append(model: Model, batch: int, context: int, *, tokens: int = 1) -> Case:
    lens = lengths(batch, model.kv_heads, context, ragged=True).clamp(min=tokens)
    rows, D = batch * tokens * model.kv_heads, model.head_dim

    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        inputs = make_lists(lens, D, device, dtype, generator)
        for name in ("k", "v"):
            new = torch.randn(batch, tokens, model.kv_heads, D, device=device, generator=generator)
            inputs[name] = new.to(dtype)
        inputs["written"] = _written(inputs).flatten()
        return inputs

    return Case(
        op="paged_append",
        model=model.name,
        shape={"batch": batch, "context": context, "tokens": tokens},
        make_inputs=make,
        run=_append,
        oracle=lambda inputs, dtype: tuple(inputs[name].flatten(0, 2).to(dtype) for name in ("k", "v")),
        sample=lambda inputs, caches: tuple(
            None if cache is None else cache.flatten(0, 1)[inputs["written"]] for cache in caches
        ),
        reset=_forget,
        flops=0,
        bytes=lambda size: 4 * rows * D * size,
        peers=(
            Peer("plain torch", _append_indexed),
            Peer("FlashInfer", _append_flashinfer, "flashinfer-python"),
        ),
    )


def _schedule_truth(inputs: Inputs, dtype: torch.dtype) -> Outputs:
    """Counted one list at a time; whole numbers in any dtype."""
    rows = []
    for lens in inputs["seq_lens"].flatten(1).tolist():
        ends = [0]
        for length in lens:
            ends.append(ends[-1] + -(-length // BLOCK_SIZE))
        share = max(-(-ends[-1] // _PROGRAMS), -(-128 // BLOCK_SIZE))
        first = [sum(end <= program * share for end in ends[1:]) for program in range(_PROGRAMS)]
        rows.append([share, *ends, *first])
    return (torch.tensor(rows, dtype=torch.int32, device=inputs["seq_lens"].device),)


def _schedule_torch(inputs: Inputs) -> Callable[[], Outputs]:
    """Without checks; lengths must not be negative."""

    def call() -> Outputs:
        units = (inputs["seq_lens"].flatten(1) + BLOCK_SIZE - 1) // BLOCK_SIZE
        ends = F.pad(units.cumsum(1, dtype=torch.int32), (1, 0))
        share = ((ends[:, -1:] + _PROGRAMS - 1) // _PROGRAMS).clamp(min=128 // BLOCK_SIZE)
        begin = torch.arange(_PROGRAMS, dtype=torch.int32, device=ends.device) * share
        first = torch.searchsorted(ends[:, 1:].contiguous(), begin, right=True, out_int32=True)
        return (torch.cat([share, ends, first], 1),)

    return call


def schedule(model: Model, batch: int, context: int) -> Case:
    """All layers of a step at once."""
    layers, lists = model.layers, batch * model.kv_heads

    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        shape = (layers, batch, model.kv_heads)
        return {"seq_lens": torch.randint(1, context + 1, shape, device=device, generator=generator, dtype=torch.int32)}

    return Case(
        op="paged_schedule",
        model=model.name,
        shape={"batch": batch, "context": context, "layers": layers},
        make_inputs=make,
        run=lambda inputs: (kvops.paged_schedule(inputs["seq_lens"], BLOCK_SIZE, num_programs=_PROGRAMS),),
        oracle=_schedule_truth,
        flops=0,
        bytes=lambda size: 4 * layers * (2 * lists + 2 + _PROGRAMS),
        peers=(Peer("plain torch", _schedule_torch),),
    )


def cases(scale: Scale) -> Iterator[Case]:
    longest, batches = scale.contexts[-1], scale.batches
    llama = scale.model(LLAMA_8B, cached=True)
    for context in scale.contexts:
        yield attention(llama, batches[0], context, spread="equal")
        yield attention(llama, batches[-1], context)
    for model in (LLAMA_70B, MISTRAL_7B, QWEN_7B, SMOLLM, GEMMA, STARCODER):
        yield attention(scale.model(model, cached=True), batches[-1], scale.contexts[0])
    yield attention(llama, batches[-1], scale.contexts[0], tokens=8)
    yield attention(llama, batches[-1], scale.contexts[0], reduce="sum")
    yield attention(llama, batches[-1], scale.contexts[0], cache="int8")
    yield attention(llama, batches[-1], scale.contexts[0], cache="int8, slot scales")
    yield attention(llama, batches[-1], scale.contexts[0], masked=True)
    # As many slots equal and as after compressing the longest context eightfold with heads that compete.
    mean = min(8192, longest // 8)
    yield attention(llama, _MANY, mean, spread="equal")
    yield attention(llama, _MANY, mean, spread="heavy-tailed")
    yield attention(llama, _MANY, mean, spread="heavy-tailed", reduce="sum")
    yield attention(llama, _MANY, mean, spread="heavy-tailed", tokens=8)
    for model in (LLAMA_8B, SMOLLM):
        yield append(scale.model(model, cached=True), batches[-1], scale.contexts[0])
    yield append(llama, 1, longest, tokens=min(512, longest // 8))
    yield schedule(llama, batches[-1], longest)
