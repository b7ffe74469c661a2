"""SmolLM2 over several processes: first its heads are split between them, then the tokens of a prompt.

    torchrun --nproc-per-node 3 examples/many_processes.py

Tensor parallelism: SmolLM2-135M has 3 KV heads, so each of 3 processes has one of them (and its 3 query heads) in every
layer, with a ragged cache of its own that it evicts from. Context parallelism: the prompt is read again with its tokens
spread over the processes, keys and values passed around a ring. On GPUs the same file uses NCCL.
"""

import argparse
import os
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from kvops.generation.generate import generate
from kvops.models.llama import Llama
from kvops.models.loading import load
from kvops.models.tensor_parallel import tensor_parallel
from kvops.parallel import ring_attention, shard, unshard
from kvops.policies import Compression


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=600, help="length of the prompt")
    parser.add_argument("--new-tokens", type=int, default=24)
    arguments = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun: torchrun --nproc-per-node 3 examples/many_processes.py")

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    mesh = init_device_mesh(kind, (size,))
    loaded = load(device=torch.device(kind), progress=rank == 0)
    prompt = loaded.tokenizer.encode(topics["debugger"], parse_special=False)
    prompt = prompt[: arguments.tokens // (2 * size) * 2 * size]  # two chunks for each process

    def say(text: str) -> None:
        if rank == 0:
            print(text, flush=True)

    part = tensor_parallel(loaded.config, loaded.weights, mesh)
    result = generate(part, [prompt], max_new_tokens=arguments.new_tokens, compression=Compression(ratio=4))
    blocks = torch.tensor([result.stats.blocks_in_use], device=kind)
    everyone = [torch.empty_like(blocks) for _ in range(size)]
    dist.all_gather(everyone, blocks)
    say(f"heads over {size} processes, {len(prompt)} tokens, cache compressed 4x:")
    say(f"  blocks on each process: {[int(count) for count in everyone]}")
    say(f"  {loaded.tokenizer.decode(result.tokens[0])!r}")

    whole = Llama(loaded.config, loaded.weights)
    tokens = torch.tensor([prompt], device=kind)
    positions = torch.arange(len(prompt), device=kind)[None]
    hidden = whole(shard(tokens), shard(positions), lambda layer, q, k, v: ring_attention(q, k, v)[0])
    logits = whole.logits(unshard(hidden)[:, -1])
    say(f"tokens over {size} processes: the next one is {loaded.tokenizer.decode([int(logits.argmax())])!r}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
