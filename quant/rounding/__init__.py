"""Choosing weight codes by what they do to a layer's output, in closed form."""
