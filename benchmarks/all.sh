#!/usr/bin/env bash
# Everything that RESULTS.md holds, on an otherwise idle machine; half an hour on two cores. Raw numbers and the plot go
# to results/, the tables are printed in the order in which they stand there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
decoding="python benchmarks/decoding.py --shape 100m --device cpu --block-size 16 --quiet"
results=benchmarks/results
single="--prompt-length 1024 --new-tokens 256"
before=()
if [ -n "${BEFORE:-}" ]; then before=(--before "$BEFORE"); fi # a checkout of an earlier commit, to compare with

$decoding $single --steps 4 2 --repetitions 3 --only plain engine qwen "${before[@]}" \
    --json $results/cpu-100m.json --plot $results/cpu-100m.png
$decoding $single --steps 4 --repetitions 3 --only plain ladder engine --compile --json $results/cpu-100m-ladder.json
$decoding --batch 8 --ragged 64 256 --new-tokens 128 --steps 4 --repetitions 3 --only engine "${before[@]}" \
    --json $results/cpu-100m-batch8.json

# Counts, which hold on any machine, of the small trained checkpoint.
ask=("Describe the picture." "What is in row "{1,2,3}"?" "What is at "{b3,a1}"?" "Which word is written?")
counted=(examples/checkpoint --image examples/images/*.png --ask "${ask[@]}")
for bound in 0.9 0.99; do
    python benchmarks/batches.py "${counted[@]}" --bound $bound
    python benchmarks/speculation.py "${counted[@]}" --bound $bound
done
for steps in 8 32; do
    python benchmarks/speculation.py "${counted[@]}" --rule low_confidence_static --steps $steps
done
