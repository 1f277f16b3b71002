#!/usr/bin/env bash
# From nothing to a pre-trained network on a laptop: makes .venv, pre-trains on the embedded digits, probes the features.
# Flags go to main_pretrain.py: `bash scripts/quickstart.sh --epochs 20 --output_dir output/short`.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh requirements.txt
python=.venv/bin/python

output=output/quickstart
arguments=("$@")
for i in "${!arguments[@]}"; do
    case ${arguments[i]} in
        --output[_-]dir) output=${arguments[i + 1]:-} ;;
        --output[_-]dir=*) output=${arguments[i]#*=} ;;
        -h | --help | --dry[_-]run) exec $python main_pretrain.py --recipe quickstart "$@" ;;
    esac
done

$python main_pretrain.py --recipe quickstart --auto_resume "$@"
newest=$(ls -t "$output"/checkpoint-*.pth | grep -v '/checkpoint-best\.pth$' | head -1)
echo
$python scripts/probe.py "$newest"
echo
echo "picture of reconstructions  $(ls "$output"/pictures/*.png | tail -1)"
echo "TensorBoard                 .venv/bin/tensorboard --logdir $output"
echo "checkpoint                  $newest"
