"""Networks and taps."""
