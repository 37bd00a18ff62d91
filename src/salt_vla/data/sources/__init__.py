"""Sources of video: each file turns one layout into segments, and says which paths it recognises.

A source is `segments(root, options) -> Listing` and `recognises(path) -> bool`; docs/howto/add-a-source.md.
"""
