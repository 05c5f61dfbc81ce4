"""``kdfast demo``: the whole of DM-KD in miniature, on real images, in minutes."""
