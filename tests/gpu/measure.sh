#!/usr/bin/env bash
# Steps per second of this machine's GPU, beside its CPU, and beside LeanRL where $LEANRL names a folder with its scripts.
# All is compiled first, side by side; the figures leave out compiling and the first row of progress.csv.
#
#     bash tests/gpu/measure.sh [python]
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${1:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

train() { # script, arguments; prints the run's folder
    local runs
    runs=$(mktemp -d -p "$folder")
    timeout 120 "$python" "$1" --num-evals 0 --checkpoint-every 1e9 --runs-dir "$runs" "${@:2}" >"$runs/log" 2>&1 ||
        { echo "failed: $*" && tail -n 5 "$runs/log"; } >&2
    echo "$runs"
}

speed() { # what, script, arguments
    local runs
    runs=$(train "${@:2}")
    awk -F, -v what="$1" 'NR == 2 { step = $1; time = $2 } NR > 2 { last = $1; end = $2 }
        END { if (end > time) printf "%-40s %8.0f steps/s\n", what, (last - step) / (end - time) }' "$runs"/*/progress.csv || true
    grep -h "compiled in\|not compiled\|steps/s:" "$runs/log" | sed 's/^/    /' || true
}

lean() { # what, script, arguments
    [ -z "${LEANRL:-}" ] && return
    timeout 100 "$python" "$LEANRL/$2_torchcompile.py" --compile --cudagraphs "${@:3}" >"$folder/lean" 2>&1 || true
    printf "%-40s %s\n" "$1" "$(grep -h "SPEED\|TAIL" "$folder/lean" | tr '\n' ' ' || tail -n 3 "$folder/lean")"
}

cheetah="--env-id HalfCheetah-v4"
one="$cheetah --num-envs 1 --num-steps 2048 --num-minibatches 32" # LeanRL's settings
sac="$cheetah --learning-starts 1000 --buffer-size 100000"
atari="--env-id ALE/Breakout-v5 --num-steps 128 --num-minibatches 4"
wide() { echo "$cheetah --actor-sizes $1 $1 --critic-sizes $1 $1"; }

nvidia-smi --query-gpu=name --format=csv,noheader
echo "$(nproc) cores, $("$python" -c 'import torch; print("torch", torch.__version__)')"
for device in cpu cuda; do
    train ppo_continuous.py $one --device $device --total-timesteps 2048 >/dev/null &
    train sac_continuous.py $sac --device $device --total-timesteps 1100 >/dev/null &
    for width in 64 256 1024; do
        train ppo_continuous.py $(wide $width) --device $device --num-steps 32 --total-timesteps 4096 >/dev/null &
    done
done
for games in 8 64; do
    train ppo_atari_cnn.py $atari --num-envs $games --threads 8 --device cuda --total-timesteps $((games * 128)) >/dev/null &
done
lean "" sac_continuous_action $cheetah --total-timesteps 5100 >/dev/null &
wait

speed "PPO, 1 x 2048, GPU" ppo_continuous.py $one --device cuda --total-timesteps 81920
speed "PPO, 1 x 2048, CPU" ppo_continuous.py $one --total-timesteps 40960
speed "SAC, batch 256, GPU" sac_continuous.py $sac --device cuda --total-timesteps 15000
speed "SAC, batch 256, CPU" sac_continuous.py $sac --device cpu --threads 2 --total-timesteps 3000
speed "TD3, batch 256, GPU" td3_continuous.py $sac --device cuda --total-timesteps 15000
speed "DQN, CartPole, GPU" dqn.py --device cuda --total-timesteps 20000
speed "Atari, 8 x 128, GPU" ppo_atari_cnn.py $atari --num-envs 8 --threads 8 --device cuda --total-timesteps 81920
lean "SAC, LeanRL" sac_continuous_action $cheetah --total-timesteps 20000
lean "Atari, LeanRL" ppo_atari_envpool --env-id Breakout-v5 --total-timesteps 122880
lean "PPO, LeanRL" ppo_continuous_action $cheetah --total-timesteps 61440
for width in 64 256 1024; do
    for device in cuda cpu; do
        threads=$([ $device$width = cpu1024 ] && echo 8 || echo 1)
        speed "PPO, 128 x 32, $width wide, $device" ppo_continuous.py $(wide $width) --num-steps 32 --device $device \
            --threads $threads --total-timesteps $([ $device$width = cpu1024 ] && echo 8192 || echo 40960)
    done
done
speed "Atari, 64 x 128, GPU" ppo_atari_cnn.py $atari --num-envs 64 --threads 16 --device cuda --total-timesteps 327680
