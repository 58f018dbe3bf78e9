"""Training objectives: each is a function from a pack's log-probabilities to a loss and metrics."""
