"""Losses of teachers made of published detectors and segmenters."""
