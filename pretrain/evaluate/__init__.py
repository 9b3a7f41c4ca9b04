"""What a frozen encoder knows: probes and label-free measures beside their baselines."""
