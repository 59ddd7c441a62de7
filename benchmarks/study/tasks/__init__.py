"""The harmless tasks that models are fine-tuned on, each made from a seed, in a file of its own.

In: how many problems, and a seed.
Out: distinct problems, instruction and output; disjoint sets come from one call that is cut up.
May import: the standard library, and what a problem is.
"""
