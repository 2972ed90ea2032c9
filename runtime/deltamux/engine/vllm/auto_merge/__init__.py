"""The worker's process on a CPU: the program with most of the traffic is merged into a second copy of the weights."""
