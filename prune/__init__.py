"""The prune room: a smaller structure, and zeros in the weights."""
