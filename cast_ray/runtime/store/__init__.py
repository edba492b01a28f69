"""Artifacts: their files and manifests, claims of running sweeps, pruning. Without torch, except `models`."""
