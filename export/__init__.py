"""The export room: one file a format, and parity of each file with the graph it came from.

It knows the quantised graph's types, not the algorithms that made it.
"""
