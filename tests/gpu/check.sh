#!/usr/bin/env bash
# All tests that need a GPU, a process for each script side by side, each with a compiler's cache of its own, and what
# each said.
#
#     bash tests/gpu/check.sh [python]
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${1:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
pids=() failed=0
for script in ppo_continuous ppo_beta ppo_discrete ppo_atari_cnn grpo sac_continuous td3_continuous dqn; do
    TORCHINDUCTOR_CACHE_DIR="$folder/$script" timeout 400 "$python" -m pytest tests/gpu/test_cuda.py -W default -q \
        -p no:cacheprovider -k "$script" --durations=0 >"$folder/$script.log" 2>&1 &
    pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
tail -n +1 "$folder"/*.log
exit $failed
