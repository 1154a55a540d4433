"""One file a contender of benchmarks/ppo_step.py; each runs as a process of its own, in an environment of its own."""
