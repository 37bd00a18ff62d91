"""The composition root: one file a command, wiring the rooms below it together."""
