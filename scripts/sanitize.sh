#!/usr/bin/env bash
# NVIDIA's compute-sanitizer over the kernels' tests on a GPU: memcheck and racecheck, a few cases of each kind of kernel.
#   bash scripts/sanitize.sh [memcheck|racecheck]      (both; about 6 minutes on an H100)
set -euo pipefail
cd "$(dirname "$0")/.."
HEAD=tests/gpu/test_head_kernel.py
CASES=(
  "$HEAD::test_full_width_logits_are_those_of_the_reference[fitted-found]"
  "$HEAD::test_full_width_logits_are_those_of_the_reference[bits alone-found]"
  "$HEAD::test_step_is_the_reference[bits alone, caps hit-bf16-found]"
  "$HEAD::test_step_is_the_reference[every cap hit-fp16-Orin Nano]"
  "$HEAD::test_step_is_the_reference[published, tied-bf16-found]"
  "tests/gpu/test_decode_kernel.py::test_tokens_are_those_of_the_definition[T 0.7, k 40, p 0.9, min-p 0.05, 900 normal-found]"
  "tests/gpu/test_decode_kernel.py::test_tokens_are_those_of_the_definition[T 1, 2000 flat-found]"
  "tests/gpu/test_dense_kernel.py::test_tokens_and_logits_are_those_of_float64[5003 x 256, int8, groups of 32-bf16-found]"
  "tests/gpu/test_dense_kernel.py::test_tokens_and_logits_are_those_of_float64[5003 x 256, int4, groups of 128-fp16-found]"
  "tests/gpu/test_layer_kernels.py"
)
for tool in "${@:-memcheck racecheck}"; do
  for each in $tool; do
    for case in "${CASES[@]}"; do
      echo "== $each $case"
      options=(-q -x -p no:cacheprovider)
      case $case in *layer_kernels.py) options+=(-k "found and bf16") ;; esac
      compute-sanitizer --tool "$each" --error-exitcode 9 --report-api-errors no --show-backtrace no --kernel-name kernel_substring=flashhead \
        --kernel-name kernel_substring=fh python3 -m pytest "${options[@]}" "$case" | grep -E "passed|failed|error|SUMMARY|hazard|Race"
    done
  done
done
