"""Plots of a report. Each function takes plain values and returns an SVG; equal values give equal bytes."""
