"""PEFT's own tests of its prompt-learning methods, run with `prefixcore.accelerate` switched on underneath.

`make test-peft`, or `python -m tests.peft`. Nothing of their code is kept here: it is downloaded from PyPI.
"""
