"""The embedded default: a tiny Chinese world, its gold judge, a tiny Baichuan that has read it, what PPO did."""
