"""Models: vision towers, language models, their assembly into a LLaVA, and the layout on disk."""
