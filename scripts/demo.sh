#!/usr/bin/env bash
# The product on a real model, end to end: fetch, convert, evaluate, generate. `make demo` runs it; BIN is the venv's bin.
set -euo pipefail
cd "$(dirname "$0")/.."
BIN=${BIN:-.venv/bin}
out=demo/SmolLM2-135M-FlashHead
report=demo/report.html
positions=15000
mkdir -p demo

step() { printf '\n== %s\n' "$*"; }

step "1/4 the model: SmolLM2-135M-Instruct"
"$BIN/python" scripts/alive.py "fetching the model" "$BIN/python" scripts/fetch_model.py
model=$("$BIN/python" scripts/fetch_model.py)

step "2/4 flashhead convert, calibrated on $positions positions of the model's own text (the default is 60,000: slower, and a firmer proof)"
"$BIN/flashhead" convert "$model" "$out" --positions "$positions" --overwrite

step "3/4 flashhead evaluate, on three texts that it was not calibrated on, up to 700 positions each"
"$BIN/flashhead" evaluate "$out" --positions 700 --html "$report" \
  --text examples/text/english.txt --text examples/text/german.txt --text examples/text/records.json

step "4/4 flashhead generate, with the fast head"
"$BIN/flashhead" generate "$out" --chat --max-new-tokens 160 --prompt "Write a Python function that returns the n-th Fibonacci number."

printf '\nThe checkpoint is %s, the report %s. Talk with it: %s/flashhead chat %s\n' "$out" "$report" "$BIN" "$out"
