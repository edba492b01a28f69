"""Names of the files inside an artifact."""

from __future__ import annotations

LABELS = "labels/labels.parquet"
CURVES = "curves.json"
"""File of a training stage."""
METRICS, RESULTS, MATCHES = "metrics.json", "results.json", "matches.npz"
"""Files of an evaluation."""
AUDIT = "audit.json"
"""File of a labelling stage."""
CALIBRATION = "calibration.npz"
"""File of a labelling stage with `pseudo.precision`: labels of D_l matched to its truth, as MATCHES."""
