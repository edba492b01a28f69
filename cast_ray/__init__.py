"""CAST: semi-supervised knowledge distillation for instance segmentation, as a Ray ablation system."""

__version__ = "0.1.0"
