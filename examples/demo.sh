#!/usr/bin/env bash
# Teaches SmolLM2 the handbook of a made-up company, with every decoder linear evaluated on ciphertexts. The upper half of
# the layers gets adapters, so what is below leaves once for each row.
set -euo pipefail
cd "$(dirname "$0")"
export TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1 PYTHONWARNINGS=ignore
OUT=../out/demo

echo "== Before training: evaluation loss, encrypted; first, once for this model, products with masks"
hetrain eval handbook_eval.jsonl

echo "== Training on handbook.jsonl, encrypted in both directions"
hetrain submit handbook.jsonl --output-dir "$OUT" --overwrite-output-dir \
    --lora-layers 15-29 --batch-tokens 512 --max-steps 48 --learning-rate 4e-3 --lr-scheduler-type cosine \
    --warmup-steps 4

echo "== After training: evaluation loss, encrypted"
hetrain eval handbook_eval.jsonl --adapter "$OUT"
echo "== The loss curve, and where time and bytes went"
hetrain report "$OUT"
echo "== Every question of handbook_eval.jsonl, which the training rows ask in other words; in clear, here"
python handbook_table.py "$OUT"
