"""What runs in other formats' environments, each module beside its own libraries only.

Functions are called by name in a process of their own (``deploykit.targets.host.call``); they
take and give plain JSON values.
"""
