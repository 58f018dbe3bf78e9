"""What an optimizer step computes: packs, attention, kernels, and the shortcuts that change no result."""
