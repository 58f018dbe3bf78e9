"""Ask a language model behind any OpenAI-compatible address: used by the data engine and by evaluation."""
