"""The fast path of `Trainer` and `predict`: a model's layers as a list of fused stages."""

from minicnn.plan.plan import Plan, plan_of, running

__all__ = ["Plan", "plan_of", "running"]
