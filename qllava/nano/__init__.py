"""The embedded default: a small drawn world, a tiny tower and a tiny LLaMA, so that a first run needs no download."""
