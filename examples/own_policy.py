"""A policy of your own, a dataclass with one method, on a real model.

    python examples/own_policy.py

The policy below measures how much a key contributes to the output: the attention that the last queries pay to it, times
the norm of its value. It works in the same way after a prompt and during decoding.
"""

import argparse
from dataclasses import dataclass

from torch import Tensor

from kvops.generation.generate import generate
from kvops.models.llama import Llama
from kvops.models.loading import load
from kvops.policies import Compression, Policy, Seen, SnapKV


@dataclass(frozen=True)
class Carried(Policy):
    """Attention of the last ``window`` queries times the norm of the value."""

    window: int = 16

    @property
    def recall(self) -> int:
        return self.window

    def score(self, seen: Seen) -> Tensor:
        attention = seen.attention(last=self.window, reduce="sum")  # [B, Hkv, S]
        return attention * seen.v.float().norm(dim=-1).transpose(1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--new-tokens", type=int, default=48)
    arguments = parser.parse_args()
    loaded = load()
    model, tokenizer = Llama(loaded.config, loaded.weights), loaded.tokenizer
    question = (
        "Alice has a red box, Bob has a blue one and Carol a green one. Dave has none. " * 3 + "Who has the blue box?"
    )
    prompt = tokenizer.encode(tokenizer.apply_chat_template([{"role": "user", "content": question}]))
    for name, policy in (("the full cache", None), ("SnapKV", SnapKV()), ("Carried", Carried())):
        compression = policy and Compression(ratio=2, policy=policy, protect_last=16)
        result = generate(
            model,
            [prompt],
            max_new_tokens=arguments.new_tokens,
            stop_tokens=tokenizer.eos_token_ids,
            compression=compression,
        )
        print(f"{name}, {result.stats.blocks_in_use} blocks: {tokenizer.decode(result.tokens[0])!r}")


if __name__ == "__main__":
    main()
