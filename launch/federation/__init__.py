"""Federated runs over Flower: the processes of server and devices, and the messages between them."""
