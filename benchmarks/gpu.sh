#!/usr/bin/env bash
# What a GPU of 80 GB has to show, in three parts of 270, 270 and 200 seconds at most; name parts to run those alone.
# Needs PyTorch and transformers and installs nothing. Results: $OUT/results.jsonl (default: benchmarks/results/gpu).
#     OUT=results benchmarks/gpu.sh a
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OUT="${OUT:-benchmarks/results/gpu}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
mkdir -p "$OUT"

# The checkout as an installed package, without pip: a link under the package's name, and a few lines of metadata.
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
ln -s "$PWD" "$site/bard_vl"
mkdir "$site/bard_vl-0.dist-info"
printf 'Metadata-Version: 2.1\nName: bard-vl\nVersion: 0\n' > "$site/bard_vl-0.dist-info/METADATA"
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"

declare -A seconds=([a]=270 [b]=270 [c]=200)
for part in "${@:-a b c}"; do
    for each in $part; do
        # Alarms end a piece; this ends a part whose GPU does not answer.
        timeout --kill-after=5 "${seconds[$each]}" python3 benchmarks/gpu.py "$each" --shape "${SHAPE:-4b}" \
            --device "${DEVICE:-cuda}" --out "$OUT" || echo "part $each ended with $?"
    done
done
python3 benchmarks/gpu.py table --out "$OUT" > "$OUT/tables.md"
cat "$OUT/tables.md"
