"""A vLLM server on this machine, with the cache whole and then an eighth of it, asked the same question.

    python examples/vllm_server.py --model FOLDER [--ratios 1 8]

Needs vLLM (kvops[vllm]) and a model that chats, in a folder as transformers writes it. The server is OpenAI-compatible
and listens on 127.0.0.1 alone.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

FACT = "The key to the old harbour office hangs behind the clock in the kitchen. "
FILLER = "The tide comes in twice a day, and the boats lie on the mud between. " * 40
QUESTION = "Where does the key to the old harbour office hang? Answer in one sentence."


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def get(url: str, body: dict | None = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        return answer.read().decode()


def ask(model: Path, ratio: float) -> None:
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--served-model-name", "it", "--max-model-len", "2048", "--enforce-eager"]
    command += ["--block-size", "32", "--kv-cache-memory-bytes", str(256 * 2**20), "--max-num-batched-tokens", "256"]
    command += ["--attention-backend", "CUSTOM", "--additional-config", json.dumps({"kvops": {"ratio": ratio}})]
    quiet = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
    server = subprocess.Popen(command, env=os.environ | quiet, stdout=sys.stderr)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            if server.poll() is not None:
                raise SystemExit("the server did not start; its messages stand above")
            try:
                get(f"{url}/health")
                break
            except OSError:
                time.sleep(1)
        used = []
        chat = {"model": "it", "messages": [{"role": "user", "content": FACT + FILLER + QUESTION}], "stream": True}
        body = json.dumps(chat | {"temperature": 0, "max_tokens": 40}).encode()
        request = urllib.request.Request(f"{url}/v1/chat/completions", body, {"Content-Type": "application/json"})
        text = ""
        with urllib.request.urlopen(request, timeout=600) as answer:
            for line in answer:
                if line.startswith(b"data: {"):
                    text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
                    metrics = get(f"{url}/metrics").splitlines()
                    used += [float(each.split()[-1]) for each in metrics if each.startswith("vllm:kv_cache_usage_perc")]
        print(f"{ratio:g}x, at most {max(used, default=0):.1%} of the pool: {text.strip()!r}", flush=True)
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a folder as transformers writes it")
    parser.add_argument("--ratios", type=float, nargs="+", default=[1, 8])
    arguments = parser.parse_args()
    for ratio in arguments.ratios:
        ask(arguments.model, ratio)


if __name__ == "__main__":
    main()
