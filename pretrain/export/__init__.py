"""Checkpoints in the layouts of other tools."""
