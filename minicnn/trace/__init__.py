"""Stepping through: every number of a forward and a backward pass, kept, listed and explained."""

from minicnn.trace.steps import Step, Trace, trace

__all__ = ["Step", "Trace", "trace"]
