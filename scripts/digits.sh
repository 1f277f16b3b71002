#!/usr/bin/env bash
# The whole way on the embedded digits: pre-train, fine-tune, linear probe, kNN; each beside the same budget without
# pre-training. Ten minutes on two cores. An argument is the folder for the runs (output/digits).
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh requirements.txt
python=.venv/bin/python
root=${1:-output/digits}
mkdir -p "$root"

accuracy() { # the last top-1 of a run's results.jsonl
    $python -c 'import json, sys; print("%.1f" % json.loads(open(sys.argv[1]).readlines()[-1])["metrics"]["top1"])' "$1/results.jsonl"
}

finished() { [ -e "$1/results.jsonl" ]; }

finished "$root/pretrain" || $python main_pretrain.py --recipe quickstart --output_dir "$root/pretrain" --auto_resume
weights=$(ls -t "$root"/pretrain/checkpoint-*.pth | grep -v best | head -1)

for stage in finetune linprobe; do
    for from in pretrained scratch; do
        run=$root/${stage}_$from
        flags=()
        [ $from = pretrained ] && flags+=(--finetune "$weights")
        # without pre-training there is nothing to keep: all layers learn at the full rate
        [ $from-$stage = scratch-finetune ] && flags+=(--layer_decay 1)
        finished "$run" || $python main_$stage.py --recipe digits_$stage --output_dir "$run" --auto_resume "${flags[@]}"
    done
done
echo
$python scripts/probe.py "$weights" --labels_per_class 0 --no_logistic
echo
echo "top-1, %                          pre-trained   without"
echo "fine-tuning, 5 epochs             $(accuracy "$root/finetune_pretrained")          $(accuracy "$root/finetune_scratch")"
echo "linear probe (MAE's protocol)     $(accuracy "$root/linprobe_pretrained")          $(accuracy "$root/linprobe_scratch")"
