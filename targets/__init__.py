"""The targets room: how an artefact is loaded and timed on each kind of device."""
