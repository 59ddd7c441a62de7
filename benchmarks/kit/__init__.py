"""The study for a model of yours: any defences, tasks, shares of poison and lengths, on public prompt sets.

In: a chat model, and names: of methods, tasks, prompt sets and judges.
Out: a folder of run files, and a page of their results.
May import: ``study``, and what it imports.
"""
