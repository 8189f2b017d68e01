"""Ablations: arms of one experiment, trained over seeds from shared stages, and compared with tests."""
