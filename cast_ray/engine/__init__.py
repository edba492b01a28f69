"""The one training loop, for every stage."""
