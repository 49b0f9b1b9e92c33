"""Serve configurations to start from; see README.md, "Scaling"."""
