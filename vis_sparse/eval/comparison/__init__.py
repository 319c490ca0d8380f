"""Searched plans and calibrated masks against their alternatives, on held-out questions of a shipped tiny model."""
