"""Predictions for new rows: a file in, a file out, by a trained stage. The kinds of predictions are in `kinds`."""
