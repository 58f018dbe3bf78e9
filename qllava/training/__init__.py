"""Training of both stages: the loop (TRL's), the trainer, memory planning and the report."""
