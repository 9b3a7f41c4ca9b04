"""Federated training: devices keep their audio and send sums of gradients, or changes of weights, to a server."""
