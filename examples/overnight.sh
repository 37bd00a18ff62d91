#!/bin/sh
# A night without an operator, as one script: in the evening a cache is begun in the background and three
# experiments wait for it in the queue; the shell is closed; something kills a training process; in the morning
# there is a comparison and a page to go on from.
#
#   sh examples/overnight.sh evening      # then close the shell; given again, it goes on where it stood
#   sh examples/overnight.sh accident     # optional: kill the first experiment's process, once it is at work
#   sh examples/overnight.sh morning      # waits for the queue's end, compares, writes PROGRESS.md
#
# The films are those of `salt-vla demo`, and the three recipes are the earlier attempt's by name, cut down to
# the demo's size. `docs/howto/overnight.md` tells the same story at full size.
set -eu

case ${1:-} in
    evening | accident | morning) ;;
    *) sed -n '2,/^set/p' "$0" | grep '^#' | cut -c 3-; exit 2 ;;
esac

# The folder that holds runs/, caches/ and queue.db, and where this script works.
: "${SALT_VLA_ROOT:=overnight}"
SALT=${SALT:-salt-vla}                # the program
DATA=${DATA:-metaworld-mini}          # a clip table, a LeRobot data set's folder, or the demo's films

# Relative paths are those of the folder in which this was called.
case $SALT in /*) ;; */*) SALT=$PWD/$SALT ;; esac
case $DATA in /* | metaworld-mini) ;; *) DATA=$PWD/$DATA ;; esac
case $SALT_VLA_ROOT in /*) ;; *) SALT_VLA_ROOT=$PWD/$SALT_VLA_ROOT ;; esac
export SALT_VLA_ROOT
mkdir -p "$SALT_VLA_ROOT"
cd "$SALT_VLA_ROOT"

SLOT=${SLOT:-cpu}                     # where the queue's jobs run: cpu, gpu0, …
TEACHER_STEPS=${TEACHER_STEPS:-800}
STEPS=${STEPS:-600}
CACHE=caches/overnight
RUNS="exp1 exp2 exp3"

# What the demo's films are cut into, and networks of the demo's size. Words without spaces, one field each.
SIZE=${SIZE:-"encoder.name=vit_micro encoder.geometry.num_frames=8 encoder.geometry.image_size=96 \
encoder.geometry.tubelet_size=2 encoder.geometry.patch_size=16 predictor.dim=96 predictor.depth=4 \
predictor.num_heads=3 data.view.frame_stride=2 data.view.num_views=3 data.view.crop_scale=0.75,1.0 \
data.view.max_shift=8 data.store_views=true data.num_workers=0"}
# How long, and how often something is written down: a crash costs at most the steps since a checkpoint.
PACE=${PACE:-"optimizer.warmup_steps=30 runtime.log_every=10 runtime.checkpoint_every=25 runtime.validate_every=100"}

evening() {
    # Stage 1 once, in the foreground: the teacher is what everything else waits for.
    # shellcheck disable=SC2086
    "$SALT" train demo_teacher $SIZE $PACE steps="$TEACHER_STEPS" --name teacher --data "$DATA"

    # The cache of its latents, in the background: it outlives this shell, and is begun again if it fails.
    grep -q '"complete": true' "$CACHE/manifest.json" 2>/dev/null ||
        "$SALT" cache build --teacher teacher --data "$DATA" --split train --out "$CACHE" --detach --restarts 2

    # The held-out part is the queue's first job; the experiments wait for both caches to be complete.
    is_queued held-out || "$SALT" queue add --slot "$SLOT" --restarts 2 --name held-out -- \
        cache build --teacher teacher --data "$DATA" --split validation --num-views 1 --out "$CACHE"
    experiment exp1 exp1_higher_lr
    experiment exp2 exp2_high_mask
    experiment exp3 exp3_combined

    # One runner for the device. It ends when the queue is empty, and is started again if it dies.
    "$SALT" queue ls --json | grep -q '"pid": ' || "$SALT" queue run --slot "$SLOT" --until-empty --detach
    "$SALT" queue ls
    echo "Close the shell; in the morning: sh examples/overnight.sh morning"
}

# experiment NAME RECIPE: a job that waits for the cache, and goes on from its last checkpoint if it is killed.
experiment() {
    # shellcheck disable=SC2086
    is_queued "$1" || "$SALT" queue add --slot "$SLOT" --restarts 2 \
        --after-cache "$CACHE" --after-cache "$CACHE/validation" -- \
        train "$2" $SIZE $PACE steps="$STEPS" --name "$1" --seed 1 --data "$DATA" --cache "$CACHE"
}

is_queued() { "$SALT" queue show "$1" >/dev/null 2>&1; }

# What no operator wants: SIGKILL, which no process can hear.
accident() {
    until is_at_work runs/exp1 && [ -n "$(ls -d runs/exp1/checkpoints/step_* 2>/dev/null)" ]; do
        if ! is_at_work runs/exp1 && ! "$SALT" queue show exp1 --json | grep -Eq "^  $UNDER_WAY"; then
            echo "exp1 is not at work, and will not be: \`salt-vla queue show exp1\` says why" >&2
            exit 1
        fi
        sleep 0.2
    done
    echo "killing process $pid of exp1"
    kill -9 "$pid"
}

# Whether the very process works that the run's status names: a number alone may be another one's by now.
is_at_work() {
    pid=$(said_by "$1" pid)
    [ "$(said_by "$1" state)" = running ] &&
        [ "$(said_by "$1" boot)" = "$(cat /proc/sys/kernel/random/boot_id)" ] &&
        [ "$(said_by "$1" ticks)" = "$(sed 's/.*) //' "/proc/$pid/stat" 2>/dev/null | cut -d ' ' -f 20)" ]
}
said_by() { sed -n "s/^  \"$2\": \"\{0,1\}\([^\",]*\).*/\1/p" "$1/status.json" 2>/dev/null; }

UNDER_WAY='"state": "(waiting|starting|running)"'

morning() {
    "$SALT" queue ls
    told=
    while "$SALT" queue ls --json | grep -Eq "$UNDER_WAY"; do
        # What no waiting helps against is said, once.
        hitch=$("$SALT" queue ls | grep -E 'queue is paused|paused by name|No runner is at work') || hitch=
        [ "$hitch" = "$told" ] || printf '%s\n' "$hitch"
        told=$hitch
        sleep "${WAIT:-5}"
    done
    "$SALT" runs ls
    # shellcheck disable=SC2086
    "$SALT" runs compare $RUNS
    "$SALT" runs report
    cat PROGRESS.md
}

"$1"
