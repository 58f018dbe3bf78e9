"""How good is a model: every score with its count and its uncertainty."""
