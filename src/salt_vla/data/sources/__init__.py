"""Sources of video: each file turns one layout into clip tables."""
