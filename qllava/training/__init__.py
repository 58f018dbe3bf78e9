"""Both stages of training: one loop (TRL's), its trainer, its memory and its report."""
