"""A page of runs, queue and caches for a browser on this machine: read-only, unless a token is given.

Only `server.py` may be imported without the extra `dashboard`; it loads the rest when a page is asked for.
"""
