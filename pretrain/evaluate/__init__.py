"""Evaluates frozen encoders by probes and label-free measures, beside baselines."""
