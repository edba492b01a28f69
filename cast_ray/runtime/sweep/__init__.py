"""A sweep: planning, scheduling rows with Ray Tune, progress and trackers. Without torch."""
