"""What training minimizes: a function for each objective, from a pack's log-probabilities to a loss and metrics."""
