"""What crosses processes and disks: records of images, targets, batches, soft targets."""
