"""From the store to a run folder and its report."""
