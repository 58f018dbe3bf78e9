"""What survives: checkpoints, signals, numbers that are not finite, several processes, a full disk."""
