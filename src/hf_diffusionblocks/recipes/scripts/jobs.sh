#!/bin/sh
# A job per block on this machine, all at once, then the merged model. Independent blocks only (a DiT, for example).
#   sh jobs.sh RECIPE NUM_BLOCKS OUTPUT_DIR [section.key=value ...]
# Killed or stopped, the same command goes on: jobs that ended are not run again.
set -eu
[ $# -ge 3 ] || { sed -n '2,4s/^# *//p' "$0" >&2; exit 2; }
recipe=$1 blocks=$2 output=$3
shift 3
mkdir -p "$output"
threads=$(($(getconf _NPROCESSORS_ONLN) / blocks))  # jobs that fight for cores are slow
[ "$threads" -ge 1 ] || threads=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$threads}"
jobs=""
failed=0
block=0
while [ "$block" -lt "$blocks" ]; do
    if [ ! -d "$output/block-$block/model" ]; then
        ${PYTHON:-python} -m hf_diffusionblocks train "$recipe" "$@" --block "$block" \
            --output-dir "$output/block-$block" >"$output/block-$block.log" 2>&1 &
        jobs="$jobs $!:$block"
    fi
    block=$((block + 1))
done
trap 'for job in $jobs; do kill "${job%%:*}" 2>/dev/null || true; done; wait; exit 130' INT TERM
for job in $jobs; do
    wait "${job%%:*}" || { failed=1; echo "block ${job##*:} failed: see $output/block-${job##*:}.log" >&2; }
done
[ "$failed" -eq 0 ] || exit 1
rm -rf "$output/model"
exec ${PYTHON:-python} -m hf_diffusionblocks merge "$output"/block-*/ --output-dir "$output/model"
