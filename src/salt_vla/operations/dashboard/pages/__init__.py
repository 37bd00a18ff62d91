"""The parts of the page, one file each: `layout(actions)` says what is there, `connect(app, live, actions)`
keeps it up to date while it is seen.
"""
