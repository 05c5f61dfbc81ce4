"""``kdfast reproduce``: the cells of a table, from nothing to a page beside the paper."""
