#!/bin/sh
# The experiment of docs/results.md: at three seeds, a teacher on pixels, a SALT student on its cached latents,
# and V-JEPA's objective (a moving average for a teacher) at as many floating-point operations as teacher, cache
# and student took together; then one table over all of them, random init and pixels.
#
#   sh examples/results.sh train      # an hour on two cores; given again, it goes on where it stood
#   sh examples/results.sh table      # half an hour; what was measured is not measured again
#   sh examples/results.sh surprise   # films of the impossible: six minutes (docs/violations.md)
#
# Another data set for the table alone: DATA=FOLDER sh examples/results.sh table
set -eu

SALT=${SALT:-salt-vla}                # the program; SALT_VLA_ROOT says where it works
DATA=${DATA:-metaworld-mini}
OUT=${OUT:-results}                   # a folder for table.md, .html, .csv, .tex and .json; surprise: OUT-surprise
# 800 steps of the teacher at 12.7 GFLOP, 8,650 views through it at 0.33 GFLOP, 1,000 steps of the student at
# 11.5 GFLOP: 24.5 TFLOP, which are 1,466 steps of 16.7 GFLOP (`salt-vla plan RECIPE --json`).
JEPA_STEPS=${JEPA_STEPS:-1466}
SUITES=${SUITES:-"probes time-arrow frame-order retrieval action-prediction inverse-dynamics forward-dynamics state events"}

case ${1:-} in
    train)
        $SALT demo --seeds 3
        for seed in 0 1 2; do
            $SALT train demo_jepa --name "jepa_s$seed" --seed "$seed" --data metaworld-mini "steps=$JEPA_STEPS"
        done ;;
    table)
        # shellcheck disable=SC2086 # One word a suite.
        $SALT eval student=demo_student student=demo_s1_student student=demo_s2_student \
            teacher=demo_teacher teacher=demo_s1_teacher teacher=demo_s2_teacher \
            jepa=jepa_s0 jepa=jepa_s1 jepa=jepa_s2 \
            --suite $SUITES --against teacher jepa --poolings grid --data "$DATA" --out "$OUT" ;;
    surprise)
        $SALT eval student=demo_student student=demo_s1_student student=demo_s2_student \
            jepa=jepa_s0 jepa=jepa_s1 jepa=jepa_s2 --suite violations --out "$OUT-surprise" ;;
    *) sed -n '2,/^set/p' "$0" | grep '^#' | cut -c 3-; exit 2 ;;
esac
