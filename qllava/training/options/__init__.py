"""The settings of a run, read and checked before torch is imported."""
