"""Encoders, decoders, heads, and the student as it is saved and exported."""
