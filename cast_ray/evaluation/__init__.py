"""AP of COCO and Cityscapes, the audit of pseudo-labels, parameters and speed."""
