"""The picture generator: read ``dataset.py`` first."""
