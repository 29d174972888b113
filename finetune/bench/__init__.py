"""A step beside another trainer's: the same work, measured from outside by one observer.

`watched.py` runs a trainer's command as it is, and `observer.py` writes down what its steps took; `trainers.py` tells
each trainer the same work; `equal.py` asks whether it is the same; `measuring.py` runs them in turn; `tables.py` says
what came of it.
"""
