"""Export of a complete LLaVA to the formats of other programs."""
