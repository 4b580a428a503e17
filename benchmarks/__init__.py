"""Timed comparisons against other programs; run by `trine bench`."""
