"""The parts of a LLaVA: towers, their assembly with a language model, and the layout on disk."""
