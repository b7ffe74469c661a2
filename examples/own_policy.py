"""A compression policy of your own, measured beside two of the package on your text and your questions.

    python examples/own_policy.py
    python examples/own_policy.py --text my.txt --questions my.jsonl --ratios 2 4 8

The same from a shell, in this folder:

    python -m kvops evaluate --text harbour.txt --questions questions.jsonl --policy own_policy:Carried --policy snapkv

The policy below measures how much a key contributes to the output: the attention that the last queries pay to it, times
the norm of its value. It works in the same way after a prompt and during decoding.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from kvops.generation.evaluate import Variant, evaluate, summarize
from kvops.generation.generate import generate
from kvops.generation.units import question_units, read_questions, text_units
from kvops.models.llama import Llama
from kvops.models.loading import load
from kvops.policies import Compression, Policy, Seen, SnapKV, Standout

HERE = Path(__file__).parent


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
    parser.add_argument("--text", type=Path, default=HERE / "harbour.txt")
    parser.add_argument("--questions", type=Path, default=HERE / "questions.jsonl", help="JSON lines")
    parser.add_argument("--ratios", type=float, nargs="+", default=[2, 4, 8])
    parser.add_argument("--context", type=int, default=2048, help="tokens that are read and then compressed")
    parser.add_argument("--held-out", type=int, default=128, help="tokens after them that are predicted")
    parser.add_argument("--new-tokens", type=int, default=32)
    arguments = parser.parse_args()

    loaded = load()
    model, tokenizer = Llama(loaded.config, loaded.weights), loaded.tokenizer
    text = arguments.text.read_text(encoding="utf-8")

    # Units are contexts with what is asked about them. The text asks for its continuation, the file has questions.
    units = [
        *text_units(tokenizer, text, context=arguments.context, held_out=arguments.held_out),
        *question_units(tokenizer, read_questions(arguments.questions), text=text, context=arguments.context),
    ]
    variants = [
        Variant("carried", Carried()),
        Variant("snapkv", SnapKV()),
        Variant("standout", Standout()),
    ]
    rows = [row for row, _ in evaluate(model, units, variants, arguments.ratios)]
    print("policy     ratio  perplexity  agreement  answers")
    for line in summarize(rows):
        print(
            f"{line.policy:9} {line.ratio:5.3g}x {line.perplexity:11.2f} {line.agreement:10.0%} "
            f"{line.right or 0:4} of {line.asked or 0}"
        )

    # The same policy while the model goes on with the text.
    prompt = tokenizer.encode(text)[: arguments.context]
    result = generate(
        model,
        [prompt],
        max_new_tokens=arguments.new_tokens,
        compression=Compression(ratio=4, policy=Carried()),
    )
    print(f"{tokenizer.decode(result.tokens[0])!r} from a cache {result.stats.compression:.1f} times smaller")


if __name__ == "__main__":
    main()
