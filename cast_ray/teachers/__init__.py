"""Teachers, one file a kind, and how their predictions become pseudo-labels."""
