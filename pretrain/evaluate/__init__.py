"""Evaluates frozen encoders by probes and label-free measures, compared with baselines."""
