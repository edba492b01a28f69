"""The instance-aware pixel-wise contrastive loss, its negatives and its rivals."""
