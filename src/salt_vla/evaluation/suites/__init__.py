"""What is asked of frozen encoders: one file a suite, one line in `salt_vla.registry.SUITES`.

A suite is a function `score(bench) -> list[Scored]`.
"""
