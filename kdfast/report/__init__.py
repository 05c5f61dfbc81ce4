"""Plots and pages from metrics files."""
