"""Robustness of a run: checkpoints, signals, values that are not finite, several processes, a full disk."""
