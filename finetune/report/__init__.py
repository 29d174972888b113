"""The report of a run: one HTML page that needs nothing else, made of the run's folder. Torch is not loaded."""
