"""Block reconstruction: learning the rounding of a unit's weights from its output."""
