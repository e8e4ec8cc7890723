"""What each script is compared by. A new script is one entry of `CASES`."""

from dataclasses import dataclass, field
from pathlib import Path

from benchmark.suites import as_words

PACKAGES = {"sb3": "stable_baselines3", "sbx": "sbx"}  # of other libraries
LEARNER = Path(__file__).with_name("learner.py")  # trains what is theirs


@dataclass(frozen=True)
class Case:
    algorithm: str  # what others call it
    env_ids: list[str]
    settings: dict[str, dict]  # by title
    ours: dict[str, dict]  # our variants, and what sets them apart
    ways: list[str]  # of stepping our environments; processes are slower here
    others: dict[str, list[str]]  # other libraries, and their ways
    theirs: dict = field(default_factory=dict)  # what makes theirs the same, in rl-zoo's words
    networks: tuple[str, ...] = ("actor_sizes", "critic_sizes")  # whose sizes are set

    @property
    def learns_off_policy(self) -> bool:
        return any("learning_starts" in settings for settings in self.settings.values())


def on_policy(common: dict, *shapes: tuple[int, int, int]) -> dict[str, dict]:
    """Settings for N environments, T steps of each in a rollout, and M minibatches of that."""
    return {
        f"{N} x {T}, minibatch {N * T // M}": common | {"num_envs": N, "num_steps": T, "num_minibatches": M}
        for N, T, M in shapes
    }


def off_policy(batch_size: int, sizes: list[int], *shapes: tuple[int, int]) -> dict[str, dict]:
    """For N environments. Random actions make the first row of progress, T steps; an update a step makes all others."""
    common = {"learning_starts": 1000, "batch_size": batch_size, "sizes": sizes}
    return {f"{N} environment{'s' * (N > 1)}": {"num_steps": T} | common | {"num_envs": N} for N, T in shapes}


MLP = {"update_epochs": 10, "sizes": [64, 64]}
PPO = {"ours": {"recompute_advantages": False}}
PRECISIONS = {"ours": {"precision": "fp32"}, "ours, bf16": {"precision": "bf16"}}
IN_TURN = {"sb3": ["sync"], "sbx": ["sync"]}
BOX_PPO = Case(
    "PPO",
    ["HalfCheetah-v4"],
    on_policy(MLP, (16, 256, 64), (1, 2048, 32), (16, 256, 4)),
    PPO,
    ["sync", "envpool"],
    IN_TURN,
    {"normalize": True},
)
BOX = off_policy(256, [256, 256], (1, 1000))
CASES = {
    "ppo_continuous": BOX_PPO,
    "ppo_beta": BOX_PPO,  # beside Gaussian policies
    "ppo_discrete": Case(
        "PPO",
        ["CartPole-v1", "LunarLander-v3"],
        on_policy(MLP, (8, 256, 32), (64, 64, 16)),
        PPO,
        ["sync", "envpool"],
        {"sb3": ["sync", "async"], "sbx": ["sync", "async"]},
        {"normalize": True},
    ),
    "ppo_atari_cnn": Case(
        "PPO",
        ["ALE/Pong-v5"],
        on_policy({"update_epochs": 4}, (8, 128, 4)),
        PRECISIONS,
        ["ale", "envpool"],
        {"sb3": ["sync", "async"]},  # SBX's network for images is another
        {"policy": "CnnPolicy"},
    ),
    "sac_continuous": Case("SAC", ["HalfCheetah-v4"], BOX, PRECISIONS, ["sync"], IN_TURN),
    "td3_continuous": Case("TD3", ["HalfCheetah-v4"], BOX, PRECISIONS, ["sync"], IN_TURN, {"noise_std": 0.1}),
    "dqn": Case(
        "DQN",
        ["CartPole-v1", "LunarLander-v3"],
        off_policy(64, [128, 128], (1, 1000), (8, 125)),
        # Others have no double Q-learning; their target is copied at every 500th step.
        {"ours": {"double_q": False, "n_step": 1, "updates_per_step": 1, "tau": 1, "target_network_frequency": 500}},
        ["sync", "envpool"],
        IN_TURN,
        {"buffer_size": 100_000, "tau": 1.0, "target_update_interval": 500},
        ("hidden_sizes",),
    ),
}


def in_our_words(case: Case, settings: dict) -> list[str]:
    """Settings, and as many steps as they say, as arguments of the script."""
    left_out = {"rollouts", "sizes", *(["num_steps"] if case.learns_off_policy else [])}
    given = {name: value for name, value in settings.items() if name not in left_out}
    given |= dict.fromkeys(case.networks, settings["sizes"]) if "sizes" in settings else {}
    given |= {"total_timesteps": settings["num_envs"] * settings["num_steps"] * settings["rollouts"]}
    return [word for name, value in given.items() for word in as_words(name, value)]


def in_their_words(case: Case, settings: dict) -> dict:
    """Settings as others name them."""
    N, T = settings["num_envs"], settings["num_steps"]
    if case.learns_off_policy:
        own = {name: settings[name] for name in ("batch_size", "learning_starts")}
        own |= {"train_freq": 1, "gradient_steps": N}
    else:
        own = {"n_steps": T, "batch_size": N * T // settings["num_minibatches"], "n_epochs": settings["update_epochs"]}
    network = {"policy_kwargs": {"net_arch": settings["sizes"]}} if "sizes" in settings else {}
    return {"n_envs": N} | own | network | case.theirs
