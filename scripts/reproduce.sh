#!/usr/bin/env bash
# Run a table or figure of the paper: scripts/reproduce.sh NAME [llama3-8b|smollm2] [remix sweep's arguments]
#
#   scripts/reproduce.sh table1-gsm8k smollm2 --processes 4
#   scripts/reproduce.sh table5 llama3-8b --processes 8
#
# With DATA=DIR the rows come from DIR/gsm8k/{train,test}.jsonl, DIR/arc_challenge/{train,test}.jsonl and
# DIR/codealpaca/train.jsonl instead of the hub. Interrupted, the same command goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=configs/paper
name=${1:-}
scale=${2:-llama3-8b}
recipe=$folder/$scale/$name.yaml
if [ ! -f "$recipe" ]; then
    echo "error: no recipe $recipe; NAME and scale are one of:" >&2
    find "$folder" -name '*.yaml' | sort | sed -E "s|$folder/([^/]+)/(.+)\.yaml|  \2 \1|" >&2
    exit 2
fi
shift $(($# > 1 ? 2 : 1))
arguments=("$@")
if [ -n "${DATA:-}" ]; then
    case $name in
        *arc*) rows=arc_challenge ;;
        *humaneval*) rows=codealpaca ;;
        *) rows=gsm8k ;;
    esac
    format=${rows%_challenge}
    arguments+=("data.train.0={path: $DATA/$rows/train.jsonl, format: $format}")
    if [ "$rows" != codealpaca ]; then
        test="{path: $DATA/$rows/test.jsonl, format: $format}"
        arguments+=("eval.tasks.0.source=$test" "eval.tasks.1.source=$test")
        if grep -q few-shot "$recipe"; then
            shots=$([ "$rows" = gsm8k ] && echo 4 || echo 5)
            arguments+=("sweep.arms.few-shot={adapter: {method: none}, train.cuda_graphs: false, eval.tasks.0.shots: $shots, \
eval.tasks.0.shots_from: {path: $DATA/$rows/train.jsonl, format: $format}}")
        fi
    fi
fi
exec "${REMIX:-remix}" sweep "$recipe" "${arguments[@]}"
