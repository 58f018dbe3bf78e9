"""Client of language models behind OpenAI-compatible addresses, for the data engine and for evaluation."""
