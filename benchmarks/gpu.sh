#!/usr/bin/env bash
# What a GPU of 80 GB has to show: tests, then decoding and training at the real shapes with random weights. An hour and
# more, most of it compilation. Raw numbers go to results/, the tables are printed; RESULTS.md and TRAINING.md take them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=benchmarks/results
pytest tests/test_cuda.py

# 2, 3.2 and 4 tokens per step; the weight-read floor is printed above each table.
for shape in 4b 2b 8b; do
    python benchmarks/decoding.py --shape $shape --device cuda --prompt-length 2048 --block-size 16 --steps 8 5 4 \
        --compile --check-interval 4 --only plain engine qwen --json $results/gpu-$shape.json
done
python benchmarks/decoding.py --shape 4b --device cuda --prompt-length 2048 --steps 4 --only plain ladder engine \
    --json $results/gpu-4b-ladder.json
# cuDNN's attention plans anew for every length, and each block has one: is it better left out?
python benchmarks/decoding.py --shape 4b --device cuda --prompt-length 2047 --steps 4 --only engine --no-cudnn \
    --json $results/gpu-4b-no-cudnn.json
# In float32 all decoders have to give the same tokens, compiled ones too: the script ends with an error otherwise.
python benchmarks/decoding.py --shape 2b --device cuda --dtype float32 --prompt-length 512 --steps 4 --compile \
    --only plain engine --json $results/gpu-2b-float32.json
python benchmarks/decoding.py --shape 4b --device cuda --batch 32 --ragged 128 2048 --steps 4 --only engine \
    --json $results/gpu-4b-batch32.json
python benchmarks/mixed_steps.py --shape 4b --device cuda --dtype bfloat16 --batch 32 --ragged 128 2048

python benchmarks/training.py --shape 4b --device cuda --lengths 1024 2048 4096 8192 \
    --json $results/gpu-training-4b.json
