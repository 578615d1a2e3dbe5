"""Sweeps over the operators of a framework."""
