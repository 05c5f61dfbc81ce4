"""``kdfast data-report``: what makes a set good or bad for a teacher, before anyone trains on it."""
