"""The shapes and options that the tests of dense and packed attention share."""

from typing import NamedTuple

import torch
from oracle import attention_mask
from torch import Tensor


class Case(NamedTuple):
    """One call; ``alibi`` and ``sinks`` say which tensors to make. Tiles are 32 x 32 in the interpreter."""

    name: str
    batch: int
    num_queries: int
    num_keys: int
    heads: tuple[int, int]
    head_dims: tuple[int, int]
    causal: bool = False
    window_left: int = -1
    window_right: int = -1
    scale: float | None = None
    softcap: float = 0.0
    sinks: bool = False
    alibi: str = ""

    def __str__(self) -> str:
        return self.name

    @property
    def mask(self) -> Tensor:
        return attention_mask(
            self.num_queries,
            self.num_keys,
            causal=self.causal,
            window_left=self.window_left,
            window_right=self.window_right,
        )

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        q = torch.randn(self.batch, self.num_queries, self.heads[0], self.head_dims[0]).to(dtype)
        k = torch.randn(self.batch, self.num_keys, self.heads[1], self.head_dims[0]).to(dtype)
        v = torch.randn(self.batch, self.num_keys, self.heads[1], self.head_dims[1]).to(dtype)
        return q, k, v

    def scoring(self) -> dict:
        """What changes the scores and the denominator, for the oracle."""
        options: dict = {"scale": self.scale, "softcap": self.softcap}
        if self.sinks:
            options["sinks"] = torch.randn(self.heads[0])
        if self.alibi:
            shape = (self.heads[0],) if self.alibi == "heads" else (self.batch, self.heads[0])
            options["alibi_slopes"] = torch.rand(shape)
        return options

    @property
    def window(self) -> dict:
        return {"causal": self.causal, "window_left": self.window_left, "window_right": self.window_right}


CASES = [
    Case("full with odd head sizes", 1, 37, 65, (2, 1), (40, 96)),
    Case("causal with three heads to a group", 1, 70, 70, (3, 1), (64, 64), causal=True),
    Case("causal with more keys than queries", 2, 33, 70, (2, 2), (80, 40), causal=True),
    Case("causal with rows that see nothing", 1, 70, 33, (2, 1), (16, 16), causal=True),
    Case("a window on both sides", 1, 70, 99, (2, 1), (32, 32), window_left=20, window_right=9),
    Case("a causal window", 1, 100, 100, (2, 1), (32, 32), causal=True, window_left=35),
    Case("a window of one key", 1, 40, 40, (2, 1), (32, 32), window_left=0, window_right=0),
    Case("a window on the right with rows that see nothing", 1, 70, 33, (2, 1), (16, 16), window_right=5),
    Case("softcap", 1, 37, 65, (2, 1), (32, 64), causal=True, softcap=1.5),
    Case("sinks with rows that see nothing", 2, 40, 33, (2, 1), (32, 32), causal=True, sinks=True),
    Case("alibi", 1, 37, 65, (2, 1), (32, 32), causal=True, alibi="heads"),
    Case("alibi for each sequence and both directions", 2, 37, 40, (2, 1), (32, 32), alibi="batch"),
    Case("a negative scale", 1, 33, 33, (2, 1), (32, 32), causal=True, scale=-0.3),
    Case("a scale of zero", 1, 17, 33, (2, 1), (32, 32), causal=True, scale=0.0),
    Case(
        "everything at once",
        *(2, 70, 90, (2, 1), (40, 24)),
        causal=True,
        window_left=50,
        scale=0.2,
        softcap=2.0,
        sinks=True,
        alibi="batch",
    ),
    Case("one query of nine heads", 1, 1, 65, (9, 3), (64, 64), causal=True),
    Case("one query and one key", 1, 1, 1, (2, 1), (64, 64), causal=True),
    Case("head size 128", 1, 33, 33, (1, 1), (128, 128), causal=True),
    Case("head size 256", 1, 17, 33, (1, 1), (256, 256), causal=True),
]

# Half precision changes how tiles are rounded, not how they are found: a few cases tell.
HALF_PRECISION = {
    "full with odd head sizes": (torch.float16,),
    "causal with three heads to a group": (torch.bfloat16,),
    "everything at once": (torch.float16, torch.bfloat16),
}
CASES_AND_DTYPES = [(case, dtype) for case in CASES for dtype in (torch.float32, *HALF_PRECISION.get(case.name, ()))]
