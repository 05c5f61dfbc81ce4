"""Every parser of somebody else's bytes, with damage."""
