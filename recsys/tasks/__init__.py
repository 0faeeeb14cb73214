"""Tasks: forward(batch) -> (loss, Outputs), which is all that the trainer knows of a model."""
