"""A whole LLaVA in the formats of other programs."""
