"""SALT for robots: pretrain a video encoder against a frozen teacher's cached latents."""
