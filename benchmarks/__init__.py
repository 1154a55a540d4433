"""Benchmarks of all stages, against TRL and against the limits of the machine, with their logs in results/."""
