"""The prune room: changes of a module's structure or zeros, before it is captured."""
