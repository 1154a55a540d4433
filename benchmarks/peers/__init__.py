"""Contenders of benchmarks/ppo_step.py, a file each; each runs as a process and in an environment of its own."""
