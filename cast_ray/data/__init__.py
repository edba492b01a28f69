"""From disk to a batch, without Ray: formats, reading, splits, views and batches."""
