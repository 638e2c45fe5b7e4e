"""What was measured, and nothing else: the report as data, and its renderings."""
