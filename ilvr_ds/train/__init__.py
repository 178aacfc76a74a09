"""The training run: loop, metrics, progress. Ties data, objective and engine together."""
