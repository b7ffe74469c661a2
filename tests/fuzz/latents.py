"""``paged_latent_attention`` over ragged lists, list by list in float64."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from random import Random

import torch
from paged_lists import Lists, expected, make_lists, pack, quantise, unpack
from rounding import rounded
from torch import Tensor

import kvops
from fuzz.inputs import DTYPES, SIDES, backend, close, laid_out, often


@dataclass(frozen=True)
class Case:
    seed: int = 0
    backend: str = "eager"
    dtype: str = "float32"
    lengths: tuple[int, ...] = (1,)  # of the lists of each sequence
    heads: int = 1  # lists of a sequence
    group: int = 1
    tokens: int = 1
    value_dim: int = 1
    rotary: int = 1
    block_size: int = 1
    ragged: bool = False  # q_lens
    causal: bool = True
    softcap: float = 0.0
    programs: int = 0  # of a schedule
    layout: str = ""  # of q
    packed: bool = False
    stored: str = ""  # dtype of a quantised cache
    scales: str = ""  # of it: one "number", or one for each of the "heads"
    invariant: bool = False


def draw(r: Random) -> Case:
    return Case(
        seed=r.randrange(2**31),
        backend="triton" if r.random() < 0.3 else r.choice(("eager", "numba")),
        dtype=r.choice(tuple(DTYPES)),
        lengths=tuple(r.choice((0, 1, r.randint(0, 20), r.randint(0, 200))) for _ in range(r.randint(1, 4))),
        heads=often(r, 1, 2, 3),
        group=r.choice((1, 3, 8, 16, 20, 40, 128)),
        tokens=often(r, 1, 2, 4, 5),
        value_dim=r.choice((1, 16, 24, 32, 64, 100, 128, 256, 512)),
        rotary=r.choice((1, 8, 16, 32, 40, 64)),
        block_size=r.choice((1, 3, 8, 16, 64)),
        ragged=r.random() < 0.3,
        causal=r.random() < 0.8,
        softcap=often(r, 0.0, 2.0, 30.0),
        programs=often(r, 0, 1, 3, 20),
        layout=often(r, "", "padded", "transposed"),
        packed=r.random() < 0.3,
        stored=often(r, "", *SIDES),
        scales=r.choice(("", "number", "heads")),
        invariant=r.random() < 0.3,
    )


def check(case: Case) -> None:
    torch.manual_seed(case.seed)
    dtype = DTYPES[case.dtype]
    lengths = [[max(0, n - h) for h in range(case.heads)] for n in case.lengths]
    head_dim = case.value_dim + case.rotary
    lists = make_lists(lengths, block_size=case.block_size, head_dim=head_dim, dtype=dtype)
    cache, scale = lists.k_cache, None
    if case.stored:
        cache, numbers, scale = _stored(case, lists)
        lists = dataclasses.replace(lists, k_cache=numbers)
    lists = dataclasses.replace(lists, v_cache=lists.k_cache[..., : case.value_dim])
    q = laid_out(torch.randn(len(lengths), case.tokens, case.heads * case.group, head_dim).to(dtype), case.layout)
    options = {"causal": case.causal, "softcap": case.softcap, "scale": head_dim**-0.5}
    if case.ragged:
        options["q_lens"] = torch.randint(0, case.tokens + 1, (len(lengths),), dtype=torch.int32)
    exact, same = expected(q, lists, **options), rounded(dtype, expected, q, lists, **options)
    with backend(case.backend):
        schedule = None
        if case.programs:
            schedule = kvops.paged_schedule(
                lists.seq_lens, case.block_size, num_programs=case.programs, batch_invariant=case.invariant
            )
        real = None
        if case.packed:
            q, real, options = pack(q, options)
        tensors = q, cache, lists.block_tables, lists.seq_lens
        options |= {"schedule": schedule, "batch_invariant": case.invariant, "cache_scale": scale}
        out, lse = kvops.paged_latent_attention(*tensors, value_dim=case.value_dim, **options)
    if real is not None:
        out, lse = unpack(real, out, lse)
    close(out, exact[0], same[0], "out")
    close(lse, exact[1], same[1], "lse")


def _stored(case: Case, lists: Lists) -> tuple[Tensor, Tensor, float | Tensor | None]:
    """The cache in 8 bits, the numbers that it stands for, and its scale."""
    codes = quantise(10 * lists.k_cache.float(), SIDES[case.stored])
    if case.scales == "":
        return codes, codes.double(), None
    if case.scales == "number":
        return codes, 0.05 * codes.double(), 0.05
    scale, by_slot = torch.rand(case.heads) + 0.5, torch.ones(lists.k_cache.shape[:2])
    for b, h in itertools.product(range(len(case.lengths)), range(case.heads)):
        by_slot[lists.slots(b, h)] = scale[h]
    return codes, codes.double() * by_slot[..., None], scale
