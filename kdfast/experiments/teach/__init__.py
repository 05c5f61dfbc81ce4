"""``kdfast teach``: a network, trained on real, labelled images."""
