"""Schedulers, the sampling loop and the synthesizer."""
