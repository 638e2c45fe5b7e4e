"""Targets on other devices: the same files, loaded and timed there, over ssh or adb."""
