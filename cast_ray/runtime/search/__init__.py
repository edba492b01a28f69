"""A search with Optuna. Without torch."""
