"""Settings of a training run: reading and checking them before torch is imported."""
