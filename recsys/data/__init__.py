"""From raw click logs to batches."""
