"""``kdfast synth``: labelled synthetic images, written as shards."""
