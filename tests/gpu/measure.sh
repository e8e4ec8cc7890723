#!/usr/bin/env bash
# Steps per second of this machine's GPU, beside its CPU, and beside LeanRL where $LEANRL names a folder with its scripts.
# Every figure leaves out compiling and the first row of progress.csv.
#
#     bash tests/gpu/measure.sh [python]
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${1:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

speed() { # what, script, arguments
    local what=$1 script=$2 runs
    shift 2
    runs=$(mktemp -d -p "$folder")
    if "$python" "$script" --num-evals 0 --checkpoint-every 1e9 --runs-dir "$runs" "$@" >"$runs/log" 2>&1; then
        awk -F, -v what="$what" 'NR == 2 { step = $1; time = $2 } NR > 2 { last = $1; end = $2 }
            END { printf "%-58s %8.0f steps/s\n", what, (last - step) / (end - time) }' "$runs"/*/progress.csv
        grep -h "seconds_\|compiled in\|impossible" "$runs/log" | sed 's/^.*compil/    compil/' || true
        tail -n 1 "$runs/log" | sed 's/^/    /'
    else
        echo "$what: failed"
        tail -n 5 "$runs/log"
    fi
}

lean() { # what, script, arguments
    local what=$1 script=$2
    shift 2
    [ -z "${LEANRL:-}" ] && return
    if timeout 150 "$python" "$LEANRL/$script" --compile --cudagraphs "$@" >"$folder/lean" 2>&1; then
        echo "$what $(grep SPEED "$folder/lean" | tail -n 1)"
    else
        echo "$what: failed"
        tail -n 5 "$folder/lean"
    fi
}

nvidia-smi --query-gpu=name --format=csv,noheader
echo "$(nproc) cores, $("$python" -c 'import torch; print("torch", torch.__version__)')"

# LeanRL's own settings.
ppo="--env-id HalfCheetah-v4 --num-envs 1 --num-steps 2048 --num-minibatches 32"
speed "PPO, 1 environment x 2048, GPU" ppo_continuous.py $ppo --device cuda --total-timesteps 102400
speed "PPO, 1 environment x 2048, CPU" ppo_continuous.py $ppo --total-timesteps 40960
lean "PPO, LeanRL" ppo_continuous_action_torchcompile.py --env-id HalfCheetah-v4 --total-timesteps 50000
sac="--env-id HalfCheetah-v4 --learning-starts 2000 --buffer-size 100000"
speed "SAC, batch 256, 256 wide, GPU" sac_continuous.py $sac --device cuda --total-timesteps 22000
speed "SAC, batch 256, 256 wide, CPU" sac_continuous.py $sac --device cpu --total-timesteps 8000
lean "SAC, LeanRL" sac_continuous_action_torchcompile.py --env-id HalfCheetah-v4 --total-timesteps 22000
atari="--env-id ALE/Breakout-v5 --num-envs 8 --num-steps 128 --num-minibatches 4"
speed "Atari, 8 environments x 128, GPU" ppo_atari_cnn.py $atari --device cuda --total-timesteps 150000
lean "Atari, LeanRL" ppo_atari_envpool_torchcompile.py --total-timesteps 150000

# When a GPU pays.
for width in 64 256 1024; do
    for device in cpu cuda; do
        speed "PPO, defaults, $width wide, $device" ppo_continuous.py --env-id HalfCheetah-v4 --device $device \
            --threads $((width > 64 && ${#device} == 3 ? 8 : 1)) --actor-sizes $width $width --critic-sizes $width $width \
            --total-timesteps $((width == 1024 && ${#device} == 3 ? 12288 : 65536))
    done
done
speed "Atari, 64 environments x 128, GPU" ppo_atari_cnn.py --env-id ALE/Breakout-v5 --num-envs 64 --num-steps 128 \
    --num-minibatches 4 --device cuda --total-timesteps 400000
