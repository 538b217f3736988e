#!/bin/sh
# Images a second of the local engine and of Ray's, twice: sh examples/engines.sh PHOTOS [MODEL]
set -eu
photos=$1
model=${2:-segformer-b0-camvid}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
for _ in 1 2; do
    for workers in 1 2; do
        for engine in local ray; do
            echo "--engine $engine --workers $workers --threads 1" >&2
            rm -rf "$out/$engine-$workers"
            segcli segment "$photos" -r -m "$model" --device cpu -o "$out/$engine-$workers" \
                --engine $engine --workers $workers --threads 1 >/dev/null
        done
    done
done
for run in local-2 ray-1 ray-2; do
    diff -r "$out/local-1" "$out/$run"
done
echo 'all masks are equal' >&2
