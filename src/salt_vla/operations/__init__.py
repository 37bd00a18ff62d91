"""What keeps work going while nobody looks, and says how it went: supervision, queue, watching, reports.

Knows run directories and processes, and imports no numerical library of the training side.
"""
