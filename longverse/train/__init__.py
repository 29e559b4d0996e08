"""Training: recipes as files, one loop, adapters and checkpoints, in plain torch."""
