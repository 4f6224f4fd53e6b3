"""What is looked at, in order of value; each module has `rows(large)` and is a process of its own.

`large`: the paper's shapes, for a GPU; otherwise small ones that a CPU runs in seconds.
"""
